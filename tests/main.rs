//! The one integration binary: each file here is a module of it, and uses the public API only.

mod calibration;
mod families;
mod formats;
mod golden;
