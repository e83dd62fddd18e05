//! A Hugging Face directory: `config.json`, safetensors shards (memory-mapped, headers checked) and the files
//! beside them. Nothing here knows a model's layout; nothing is trusted before it is checked.

mod output;
mod shards;

pub use output::{OutputLayout, OutputWriter, Placement, digest};
pub(crate) use output::{header, hex};
pub(crate) use shards::read_json;
pub use shards::{Checkpoint, TensorView};
