//! Causal grouped-query attention by products and a softmax, tiled over queries: of the scores a tile is in memory.

use super::matrix::product;
use crate::numerics::attention::AttentionShape;
use crate::numerics::elementwise;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

/// Scores of a tile, at most: 64 MiB of them in f32.
const SCORES_MAX: usize = 16 << 20;
/// Bytes of a tile: scores and probabilities.
pub(crate) const TILE_BYTES: u64 = 2 * 4 * SCORES_MAX as u64;

/// As [`crate::numerics::attention::attention`], for f32 tensors of the same shapes. Products take queries, keys, values and
/// probabilities in `precision`.
///
/// # Errors
/// Shapes do not fit, or the device has no memory left.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: Option<&[f32]>,
    shape: AttentionShape,
    precision: DType,
) -> Result<Tensor> {
    let AttentionShape {
        length,
        heads,
        kv_heads,
        head_dim,
        value_dim,
        ..
    } = shape;
    let share = heads / kv_heads;
    let sinks = sinks
        .map(|sinks| Tensor::from_slice(sinks, heads, q.device()))
        .transpose()?;
    // [tokens, heads * width] → [kv heads, tokens * heads a kv head, width]: the queries of a kv head are rows of one matrix.
    let arrange = |x: &Tensor, share: usize, width: usize| {
        let tokens = x.dim(0)?;
        let x = x
            .to_dtype(precision)?
            .reshape((tokens, kv_heads, share * width))?;
        x.transpose(0, 1)?
            .contiguous()?
            .reshape((kv_heads, tokens * share, width))
    };
    let (q, k, v) = (
        arrange(q, share, head_dim)?,
        arrange(k, 1, head_dim)?,
        arrange(v, 1, value_dim)?,
    );
    let tokens = k.dim(1)?;
    let tile = (SCORES_MAX / (heads * length)).clamp(1, length);
    let mut out = Vec::new();
    for sequence in (0..tokens).step_by(length) {
        for first in (0..length).step_by(tile) {
            let queries = tile.min(length - first);
            let low = shape
                .window
                .map_or(0, |window| (first + 1).saturating_sub(window));
            let keys = first + queries - low;
            let q = q.narrow(1, (sequence + first) * share, queries * share)?;
            let keys_of = |x: &Tensor| x.narrow(1, sequence + low, keys);
            let scores = product(&q, &keys_of(&k)?.transpose(1, 2)?)?;
            let softmax = Softmax {
                shape,
                sinks: &sinks,
                share,
                first,
                low,
                precision,
            };
            let probabilities = scores.apply_op1_no_bwd(&softmax)?;
            out.push(product(&probabilities, &keys_of(&v)?)?);
        }
    }
    let out = Tensor::cat(&out, 1)?.reshape((kv_heads, tokens, share * value_dim))?;
    out.transpose(0, 1)?
        .contiguous()?
        .reshape((tokens, heads * value_dim))
}

/// Causal softmax of scores `[kv heads, queries * share, keys]` f32, into `precision`: the queries from `first` on, `share` heads of each after
/// another, the keys from `low` on.
struct Softmax<'a> {
    shape: AttentionShape,
    sinks: &'a Option<Tensor>,
    share: usize,
    first: usize,
    low: usize,
    precision: DType,
}

impl CustomOp1 for Softmax<'_> {
    fn name(&self) -> &'static str {
        "attention_softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, rows, keys) = layout.shape().dims3()?;
        let sinks = self.sinks.as_ref().map(Tensor::to_vec1::<f32>).transpose()?;
        let (CpuStorage::F32(scores), Some((begin, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("the softmax takes contiguous f32 scores");
        };
        let mut out = scores[begin..end].to_vec();
        for (i, row) in out.chunks_exact_mut(keys).enumerate() {
            let query = self.first + i % rows / self.share;
            let head = i / rows * self.share + i % self.share;
            let seen = self
                .shape
                .window
                .map_or(0, |window| (query + 1).saturating_sub(window));
            let (from, to) = (seen.max(self.low) - self.low, query + 1 - self.low);
            let sink = sinks.as_ref().map(|sinks| sinks[head]);
            elementwise::softmax(&mut row[from..to], self.shape.scale, self.shape.softcap, sink);
            row[..from].fill(0.0);
            row[to..].fill(0.0);
        }
        let out = match self.precision {
            DType::F32 => CpuStorage::F32(out),
            DType::BF16 => CpuStorage::BF16(out.into_iter().map(bf16::from_f32).collect()),
            DType::F16 => CpuStorage::F16(out.into_iter().map(f16::from_f32).collect()),
            other => bail!("no attention in {other:?}"),
        };
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use super::cuda::{Arg, FORWARD, Threads, floats, kind, launch, pointer, pointer_at, u32_arg};
        let (kv_heads, rows, keys) = layout.shape().dims3()?;
        let out = floats(&storage.device, self.precision, kv_heads * rows * keys)?;
        let sinks = self.sinks.as_ref().map_or(Ok(Arg::Pointer(0)), pointer)?;
        // The scores are a tile that nobody else reads: the kernel works in them.
        let args = [
            pointer_at(&out, &Layout::contiguous(kv_heads * rows * keys))?,
            pointer_at(storage, layout)?,
            sinks,
            u32_arg(rows)?,
            u32_arg(keys)?,
            u32_arg(self.share)?,
            u32_arg(self.first)?,
            u32_arg(self.low)?,
            u32_arg(self.shape.window.unwrap_or(u32::MAX as usize))?,
            Arg::F32(self.shape.scale),
            Arg::F32(self.shape.softcap.unwrap_or(0.0)),
            kind(self.precision)?,
        ];
        // A block of threads a row.
        let threads = Threads {
            columns: rows * ROW_THREADS as usize,
            rows: kv_heads,
            block: ROW_THREADS,
        };
        launch(&storage.device, FORWARD, "softmax", threads, &args)?;
        Ok((out, layout.shape().clone()))
    }
}

/// Threads of a block of the softmax: see kernels/forward.cu.
#[cfg(feature = "cuda")]
const ROW_THREADS: u32 = 256;
