//! Two-way file reconciliation as pure functions: manifests, ignore rules, guarded paths, plans.
