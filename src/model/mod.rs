//! Models.
pub mod families;
pub mod spec;
