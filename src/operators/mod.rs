//! The timely operators of quantflow, one a file, each a function from stream to stream. They know no command line and
//! no graph: pipelines chain them. Time is the step, a position in the plan; records are small, tensors stay in worker-local state.

pub mod accumulate;
pub mod activations;
mod behind;
pub mod carry;
pub mod chunks;
pub mod commit;
pub mod embed;
pub mod experts;
pub mod factor;
pub mod forward;
pub mod gather;
pub mod groups;
pub mod install;
pub mod keep;
pub mod kept;
pub mod load;
pub mod local;
mod mixture;
pub mod pack;
pub mod predict;
pub mod records;
pub mod replay;
pub mod solve;
pub mod spread;
pub mod stages;
mod step_end;

pub use local::{Halt, Local, Pass, Shared};
pub use step_end::at_step_end;
