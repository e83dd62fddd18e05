//! quantflow turns a Hugging Face checkpoint (a language model, or a multimodal model) into a quantized one.
//! See `ARCHITECTURE.md` for the graph and the laws; imports go one way:
//! numerics, formats, checkpoint ← model, statistics ← operators ← pipelines ← cli.

pub mod allocation;
pub mod artifact;
pub mod budget;
pub mod calibration;
pub mod checkpoint;
pub mod cli;
pub mod device;
pub mod error;
pub mod formats;
pub mod ledger;
pub mod memory;
pub mod model;
pub mod numerics;
pub mod operators;
pub mod plan;
pub mod recipe;
pub mod report;
pub mod statistics;
pub mod storage;
pub mod system;

#[path = "../pipelines/mod.rs"]
pub mod pipelines;
