//! What is solved at a time: rows of linears that have one input and one grid. A step's chunks are the same however its experts are grouped.

use super::{Plan, PlannedLinear};
use crate::device::solver::rows_at_a_time;
use crate::model::SiteKind;
use std::ops::Range;

/// Weight rows that are solved together on the CPU. Fixed, so that the work's split never depends on the number of workers.
pub(super) const CHUNK_ROWS: usize = 128;
/// Rows of several linears that are solved together on a device: a lane's columns come one after the other, so that few lanes take as long
/// as many, and more would take memory alone.
const JOINED_ROWS: usize = 8192;

/// Rows that are worked on together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Their input.
    pub site: SiteKind,
    /// Whose they are: of one linear on the CPU.
    pub parts: Vec<Part>,
}

/// Rows of a linear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Position in [`Plan::linears`].
    pub linear: usize,
    /// Which.
    pub rows: Range<usize>,
}

impl Chunk {
    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows.len()).sum()
    }

    /// Where the rows of each part are among those of all.
    pub fn places(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().scan(0, |before, part| {
            let first = *before;
            *before += part.rows.len();
            Some(first..*before)
        })
    }
}

impl Plan {
    /// The rows of a step's linears, as they are worked on: [`CHUNK_ROWS`] of one linear, which fit a core's caches; on a device, where it is
    /// room that bounds them, as many of all linears together that are side by side and have one input and one grid.
    pub fn chunks(&self, step: u64) -> Vec<Chunk> {
        let linears = self.step_linears(step);
        if self.device_weight_bytes.is_none() {
            return linears
                .chunks(1)
                .flat_map(|linear| cut(linear, CHUNK_ROWS))
                .collect();
        }
        together(linears, self.experts_joined())
    }

    /// Experts whose gates and ups are solved together, which therefore are in one group.
    pub(super) fn experts_joined(&self) -> usize {
        self.device_weight_bytes
            .map_or(1, |_| experts_joined(&self.linears))
    }
}

fn experts_joined(linears: &[PlannedLinear]) -> usize {
    let gate = (linears.iter()).find(|linear| linear.expert().is_some() && linear.site == SiteKind::GateUp);
    let most = gate.map_or(1, |gate| {
        JOINED_ROWS.min(rows_at_a_time(gate.columns)) / (2 * gate.rows)
    });
    // A power of two: half of a group is a group again.
    1 << most.max(1).ilog2()
}

/// Rows of all linears that are side by side and have one input and one grid, and of `experts` experts.
fn together(linears: &[PlannedLinear], experts: usize) -> Vec<Chunk> {
    let set = |linear: &PlannedLinear| linear.expert().map(|expert| expert / experts);
    linears
        .chunk_by(|a, b| (a.site, a.grid, set(a)) == (b.site, b.grid, set(b)))
        .flat_map(|set| cut(set, rows_at_a_time(set[0].columns)))
        .collect()
}

/// The rows of `linears`, one after the other, `most` at a time.
fn cut(linears: &[PlannedLinear], most: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut room = 0;
    for linear in linears {
        let mut first = 0;
        while first < linear.rows {
            if room == 0 {
                let (site, parts) = (linear.site, Vec::new());
                chunks.push(Chunk { site, parts });
                room = most;
            }
            let rows = first..linear.rows.min(first + room);
            room -= rows.len();
            first = rows.end;
            if let Some(chunk) = chunks.last_mut() {
                let linear = linear.index;
                chunk.parts.push(Part { linear, rows });
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::FusedLayout;
    use crate::model::{FusedSlice, LinearSpec};
    use crate::numerics::{Grid, ScaleDtype};

    /// Linears of `rows` rows, with the experts that they belong to.
    fn linears(site: SiteKind, columns: usize, of: &[(usize, Option<usize>)]) -> Vec<PlannedLinear> {
        let slice = |expert: usize| FusedSlice {
            tensor: String::new(),
            expert,
            experts: of.len(),
            part: 0,
            parts: 2,
            layout: FusedLayout {
                input_first: false,
                interleaved: false,
            },
        };
        let linear = |(index, &(rows, expert)): (usize, &(usize, Option<usize>))| PlannedLinear {
            index,
            block: 0,
            site,
            slot: index,
            spec: LinearSpec {
                name: "".into(),
                rows,
                columns,
                fused: expert.map(slice),
            },
            name: String::new(),
            rows,
            columns,
            stored_bytes: 0,
            grid: Some(Grid {
                bits: 4,
                group_size: 128,
                symmetric: true,
                scale_dtype: ScaleDtype::Bf16,
            }),
            fallback: None,
            kept: false,
        };
        of.iter().enumerate().map(linear).collect()
    }

    /// Each row of each linear once, in order.
    fn assert_whole(chunks: &[Chunk], linears: &[PlannedLinear]) {
        let mut parts = chunks.iter().flat_map(|chunk| &chunk.parts);
        for linear in linears {
            let mut next = 0;
            while next < linear.rows {
                let part = parts.next().unwrap();
                assert_eq!((part.linear, part.rows.start), (linear.index, next));
                assert!(!part.rows.is_empty());
                next = part.rows.end;
            }
            assert_eq!(next, linear.rows);
        }
        assert_eq!(parts.next(), None);
    }

    #[test]
    fn every_row_is_in_one_chunk() {
        let dense = linears(SiteKind::GateUp, 4096, &[(14336, None), (14336, None)]);
        let most = rows_at_a_time(4096);
        let chunks = together(&dense, 1);
        assert_whole(&chunks, &dense);
        let rows: Vec<usize> = chunks.iter().map(Chunk::rows).collect();
        assert_eq!(rows, [most, most, most, 28672 - 3 * most]);
        let places: Vec<_> = chunks[1].places().collect();
        assert_eq!(places, [0..14336 - most, 14336 - most..most]);
        assert_whole(&cut(&dense[..1], CHUNK_ROWS), &dense[..1]);

        let mut left_alone = linears(SiteKind::Qkv, 4096, &[(4096, None), (1024, None), (1024, None)]);
        left_alone[1].grid = None;
        let chunks = together(&left_alone, 1);
        assert_whole(&chunks, &left_alone);
        assert_eq!(chunks.len(), 3);
    }

    /// Those of groups of experts are those of all.
    #[test]
    fn chunks_do_not_know_of_groups() {
        let of: Vec<_> = (0..2 * 10).map(|i| (768, Some(i / 2))).collect();
        let experts = linears(SiteKind::GateUp, 2048, &of);
        let joined = experts_joined(&experts);
        assert_eq!(joined, 4);
        let all = together(&experts, joined);
        assert_whole(&all, &experts);
        assert_eq!(
            all.iter().map(Chunk::rows).collect::<Vec<_>>(),
            [6144, 6144, 3072]
        );
        let group = |linear: &PlannedLinear| linear.expert().map(|expert| expert / (2 * joined));
        let groups = experts.chunk_by(|a, b| group(a) == group(b));
        assert_eq!(
            groups
                .flat_map(|group| together(group, joined))
                .collect::<Vec<_>>(),
            all
        );
        // Experts that are large fill a chunk by themselves.
        let large = linears(SiteKind::GateUp, 4096, &[(14336, Some(0)), (14336, Some(0))]);
        assert_eq!(experts_joined(&large), 1);
    }
}
