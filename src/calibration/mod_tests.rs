//! Batches, ids and the probe.

use super::*;

#[test]
fn batches_hold_whole_sequences() {
    let check = |count: usize, length: usize, shapes: &[usize]| {
        let tokens: Vec<u32> = (0..(count * length) as u32).collect();
        let made = batches(&tokens, length);
        let found: Vec<usize> = made.iter().map(|b| b.sequences).collect();
        assert_eq!(found, shapes, "{count} x {length}");
        let joined: Vec<u32> = made.iter().flat_map(|b| b.tokens.clone()).collect();
        assert_eq!(joined, tokens);
        assert!(
            made.iter()
                .enumerate()
                .all(|(i, b)| b.index == i && b.length == length)
        );
    };
    check(3, 512, &[1, 1, 1]);
    check(2, 2048, &[1, 1]);
    check(5, 256, &[2, 2, 1]);
    check(6, 200, &[2, 2, 2]);
    check(0, 8, &[]);
}

#[test]
fn ids_follow_content_and_shape() {
    let id = ContentId::of(2, 2, &[1, 2, 3, 4]);
    assert_eq!(id, ContentId::of(2, 2, &[1, 2, 3, 4]));
    assert_ne!(id, ContentId::of(1, 4, &[1, 2, 3, 4]));
    assert_ne!(id, ContentId::of(2, 2, &[1, 2, 4, 3]));
    let json = serde_json::to_string(&id).unwrap();
    assert_eq!(json, format!("\"{id}\""));
    assert_eq!(serde_json::from_str::<ContentId>(&json).unwrap(), id);
    for bad in ["\"\"", "\"+123456789abcdef\"", "\"zz\"", "3"] {
        assert!(serde_json::from_str::<ContentId>(bad).is_err(), "{bad}");
    }
}

/// Stored statistics depend on these ids: they must never change.
#[test]
fn the_probe_is_fixed() {
    assert_eq!(probe(49152, 6), PROBE_49152);
    assert!(probe(7, 1000).iter().all(|&id| id < 7));
    assert_eq!(probe(49152, 512)[..6], probe(49152, 6));
    assert_ne!(probe(49152, 6), probe(49153, 6));
}

const PROBE_49152: [u32; 6] = [4878, 31094, 30986, 11680, 35663, 17273];
