//! Models.
pub mod spec;
