//! Arrays that NumPy writes, and damaged ones.

use super::*;
use npyz::WriterBuilder;
use proptest::prelude::*;

fn written<T: npyz::AutoSerialize + Copy>(shape: &[u64], order: npyz::Order, ids: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let writer = npyz::WriteOptions::new()
        .default_dtype()
        .shape(shape)
        .order(order);
    let mut writer = writer.writer(&mut bytes).begin_nd().unwrap();
    writer.extend(ids.iter().copied()).unwrap();
    writer.finish().unwrap();
    bytes
}

fn check(bytes: &[u8], expect: std::result::Result<&[u32], &str>) {
    let found = parse(bytes, bytes.len() as u64, 10, Path::new("x.npy"));
    match (found, expect) {
        (Ok(found), Ok(tokens)) => assert_eq!(found.tokens, tokens),
        (Err(found), Err(part)) => assert!(found.to_string().contains(part), "{found}"),
        (found, _) => panic!("{found:?}"),
    }
}

#[test]
fn reads_what_numpy_writes() {
    use npyz::Order::{C, Fortran};
    let ids = [1i32, 2, 3, 4, 5, 9];
    check(&written(&[2, 3], C, &ids), Ok(&[1, 2, 3, 4, 5, 9]));
    check(&written(&[2, 3], C, &ids.map(i64::from)), Ok(&[1, 2, 3, 4, 5, 9]));
    check(&written(&[2, 3], Fortran, &ids), Err("Fortran"));
    check(&written(&[6], C, &ids), Err("shape"));
    check(&written(&[1, 2, 3], C, &ids), Err("shape"));
    check(&written(&[2, 3], C, &ids.map(|i| i as f32)), Err("dtype is <f4"));
    check(&written(&[1, 2], C, &[1i32, 10]), Err("id 10 at [0, 1]"));
    check(&written(&[1, 2], C, &[-100i64, 1]), Err("id -100 at [0, 0]"));
    check(&written::<i32>(&[0, 3], C, &[]), Err("no tokens"));
    check(&[], Err("not a .npy"));
    check(&written(&[2, 3], C, &ids)[..120], Err("ends in its header"));
    let mut long = written(&[2, 3], C, &ids);
    long.push(0);
    check(&long, Err("header describes"));
}

#[test]
fn sizes_that_overflow_are_errors() {
    for shape in [
        "(9223372036854775807, 9223372036854775807)",
        "(99999999999999999999, 1)",
        "(-1, 3)",
        "()",
        "((((((",
        "(1 2)",
    ] {
        let header = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}");
        let mut bytes = [MAGIC.as_slice(), &[1, 0], &(header.len() as u16).to_le_bytes()].concat();
        bytes.extend_from_slice(header.as_bytes());
        check(&bytes, Err("s"));
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(noise in prop::collection::vec(any::<u8>(), 0..200), keep in 0usize..150) {
        let mut bytes = written(&[2, 3], npyz::Order::C, &[1i32, 2, 3, 4, 5, 9]);
        bytes.truncate(keep);
        bytes.extend_from_slice(&noise);
        let _ = parse(&bytes[..], bytes.len() as u64, 10, Path::new("x.npy"));
    }
}
