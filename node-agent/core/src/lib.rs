//! The node agent's decisions, sans-IO: VM lifecycle, assignments, capacity.
