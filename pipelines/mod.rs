//! One file a dataflow graph, each drawn on top and readable as a chain of named operators; and the runs around them.

pub mod allocate;
pub mod data_free;
mod earlier;
pub mod evaluate;
mod finish;
pub mod folder;
pub mod job;
pub mod predict;
pub mod quantize;
pub mod resolve;
pub mod run;
pub mod sensitivity;
pub mod sequential;
pub mod solve;
pub mod statistics;
pub mod sweep;
pub mod verify;
