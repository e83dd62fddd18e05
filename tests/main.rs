//! The one integration binary: each file here is a module of it, and uses the public API only.

mod allocation;
mod calibration;
mod checkpoint;
mod device;
mod families;
mod formats;
mod golden;
mod kernels;
mod layout;
mod linear;
mod mixtures;
mod quantize;
mod reference;
mod solver;
mod sources;
mod statistics;
mod watch;
