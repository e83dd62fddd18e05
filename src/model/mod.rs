//! Models: families read from `config.json` into one description, one block that it drives, and the text tower that
//! feeds the block from a checkpoint. Knows neither quantization nor timely.

pub mod block;
pub mod families;
pub mod ops;
mod rotary;
mod source;
pub mod spec;
mod tower;

pub use block::{Block, Linear, LinearSpec, Norms, SiteKind};
pub use rotary::Rotary;
pub use source::Source;
pub use tower::Tower;
