//! Models: families read from `config.json` into one description, one block that it drives, and the text tower that
//! feeds the block from a checkpoint, dequantized where it is quantized. Knows neither how codes are chosen nor timely.

pub mod block;
mod coded;
pub mod families;
mod linear;
pub mod mixture;
pub mod mla;
pub mod ops;
mod rotary;
pub mod sites;
mod source;
pub mod spec;
mod tower;
mod weights;

pub use block::{Block, Norms};
pub use coded::Coded;
pub use linear::{Linear, Weight, panel_rows};
pub use rotary::Rotary;
pub use sites::{FusedSlice, LinearSpec, SiteKind};
pub use source::{LOGITS_BYTES, LoadedBlock, Source};
pub use tower::Tower;
