//! One file a dataflow graph, each drawn on top and readable as a chain of named operators.

pub mod data_free;
pub mod evaluate;
pub mod quantize;
pub mod resolve;
pub mod run;
pub mod sequential;
pub mod solve;
pub mod statistics;
pub mod verify;
