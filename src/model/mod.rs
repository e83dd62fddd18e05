//! Models: families read from `config.json` into one description, one block that it drives, and the text tower that
//! feeds the block from a checkpoint. Knows neither quantization nor timely.

pub mod block;
pub mod families;
mod fp8;
pub mod mixture;
pub mod mla;
pub mod ops;
mod rotary;
pub mod sites;
mod source;
pub mod spec;
mod tower;

pub use block::{Block, Linear, Norms};
pub use rotary::Rotary;
pub use sites::{LinearSpec, SiteKind};
pub use source::{LoadedBlock, Source};
pub use tower::Tower;
