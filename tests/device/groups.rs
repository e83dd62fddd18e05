//! A mixture whose experts are too large to be solved all together.

use super::{placements, random, smallest};
use crate::mixtures;
use crate::quantize::run;
use crate::sources::stored::{Checkpoint, Tensor};
use quantflow::pipelines::job::Job;
use quantflow::plan::Plan;
use std::path::Path;

/// Inner width of an expert: gates and ups of two of the six are solved together.
const INNER: usize = 1056;

/// The fixtures' mixture with wide experts, of random weights.
fn write_model(folder: &Path) {
    let mut model = Checkpoint::read(&mixtures::model("qwen3_moe"));
    model.config["moe_intermediate_size"] = INNER.into();
    let mut random = random(1);
    let experts = model
        .tensors
        .iter_mut()
        .filter(|(name, _)| name.contains(".experts."));
    for (name, tensor) in experts {
        let mut shape = tensor.shape.clone();
        shape[usize::from(name.contains("down_proj"))] = INNER;
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| 0.05 * random()).collect();
        *tensor = Tensor::f32(&shape, &values);
    }
    model.write(folder);
}

#[test]
fn groups_of_experts_fit_into_a_device_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model);
    for (index, placement) in placements().into_iter().enumerate() {
        let job = |kind: &str| Job {
            calibration: mixtures::text(16, 24, 1),
            placement: placement.clone(),
            ..Job::new(
                model.clone(),
                folder.path().join(format!("{index}-{kind}")),
                mixtures::recipe("qwen3_moe", 0.0),
            )
        };
        let few = Job {
            device_memory: smallest(&job("few")),
            ..job("few")
        };
        let [all, few] = [job("all"), few].map(|job| {
            let (_, plan) = job.plan().unwrap();
            (
                plan.experts_per_step(),
                chunks(&plan),
                run(&job).unwrap().output_digest,
            )
        });
        assert_eq!((all.0, few.0), (6, 2));
        assert_eq!((all.1, all.2), (few.1, few.2));
    }
}

/// The rows that are solved together, in the order of linears: whose they are, and the first of each.
fn chunks(plan: &Plan) -> Vec<Vec<(usize, usize)>> {
    let chunks = (0..plan.steps()).flat_map(|step| plan.chunks(step));
    let rows = chunks.map(|chunk| {
        let parts = chunk.parts.iter();
        parts.map(|part| (part.linear, part.rows.start)).collect()
    });
    let mut rows: Vec<Vec<_>> = rows.collect();
    rows.sort();
    rows
}
