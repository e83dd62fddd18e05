//! quantflow turns a Hugging Face checkpoint into a quantized one.

pub mod calibration;
pub mod error;
pub mod formats;
pub mod model;
pub mod numerics;
