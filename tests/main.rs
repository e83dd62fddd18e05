//! The one integration binary: each file here is a module of it, and uses the public API only.

mod calibration;
mod families;
mod golden;
//! Integration tests: one binary, a module a subject.

mod formats;
