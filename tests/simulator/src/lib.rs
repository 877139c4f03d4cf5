//! Both cores under one seed.
