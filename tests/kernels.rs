//! The CUDA kernels, as they are, built by the C compiler and run on the CPU: each against its definition. Launches, and calls of NVIDIA's
//! libraries, are what tests/cuda/run tests, which needs a build with the feature.

mod codes;
mod forward;
mod solver;
mod sums;

use half::{bf16, f16};
use libloading::Library;
use quantflow::storage;
use regex::Regex;
use std::ffi::c_void;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// How kernels name a dtype, and what a value becomes in it.
type Kind = (i32, fn(f32) -> f32);

const KINDS: [Kind; 3] = [
    (0, |value| value),
    (1, |value| bf16::from_f32(value).to_f32()),
    (2, |value| f16::from_f32(value).to_f32()),
];

/// What a kernel wrote, `count` values of a kind.
fn widened(kind: i32, words: &[u32], count: usize) -> Vec<f32> {
    let halves: &[u16] = bytemuck::cast_slice(words);
    match kind {
        0 => words[..count].iter().map(|&word| f32::from_bits(word)).collect(),
        1 => halves[..count]
            .iter()
            .map(|&half| bf16::from_bits(half).to_f32())
            .collect(),
        _ => halves[..count]
            .iter()
            .map(|&half| f16::from_bits(half).to_f32())
            .collect(),
    }
}

/// An argument of a kernel: a place, or a value.
#[derive(Clone, Copy)]
enum Arg {
    Pointer(*mut c_void),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
}

/// Values that a kernel reads.
fn of<T>(values: &[T]) -> Arg {
    Arg::Pointer(values.as_ptr().cast_mut().cast())
}

/// Values that a kernel writes.
fn to<T>(values: &mut [T]) -> Arg {
    Arg::Pointer(values.as_mut_ptr().cast())
}

fn number(value: usize) -> Arg {
    Arg::U32(value as u32)
}

/// The kernels; one runs at a time, since their threads' names of themselves are the process's.
fn kernels() -> MutexGuard<'static, Library> {
    static KERNELS: OnceLock<Mutex<Library>> = OnceLock::new();
    let kernels = KERNELS.get_or_init(|| Mutex::new(build()));
    kernels.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn build() -> Library {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = root.join("src/device/kernels");
    let signature = Regex::new(r"(?s)KERNEL\s+(\w+)\(([^)]*)\)\s*\{").unwrap();
    let mut text = format!("#include \"{}\"\n", root.join("tests/kernels/host.h").display());
    let mut found = 0;
    for entry in std::fs::read_dir(&sources).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        writeln!(text, "#include \"{}\"", path.display()).unwrap();
        for kernel in signature.captures_iter(&std::fs::read_to_string(&path).unwrap()) {
            found += 1;
            let name = &kernel[1];
            let values: Vec<String> = kernel[2]
                .split(',')
                .enumerate()
                .map(|(i, parameter)| {
                    let end = parameter.rfind([' ', '*']).unwrap();
                    format!("*({}*)a[{i}]", &parameter[..=end])
                })
                .collect();
            writeln!(
                text,
                "static void call_{name}(void **a) {{ {name}({}); }}",
                values.join(", ")
            )
            .unwrap();
            writeln!(
                text,
                "int run_{name}(unsigned columns, unsigned rows, unsigned threads, void **a) {{ return launch(call_{name}, columns, rows, threads, a); }}"
            )
            .unwrap();
        }
    }
    assert!(found > 10, "only {found} kernels were found");
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("kernels.c"), folder.path().join("kernels.so"));
    storage::write_whole(&source, text.as_bytes()).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(&compiler)
        .args([
            "-std=gnu11",
            "-O1",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unused-function",
            "-Werror",
            "-shared",
            "-fPIC",
            "-pthread",
            "-o",
        ])
        .args([&library, &source])
        .arg("-I")
        .arg(&sources)
        .arg("-lm")
        .status()
        .unwrap();
    assert!(status.success(), "{compiler} could not build the kernels");
    // SAFETY: the library was just made from our own sources and runs nothing when it is loaded.
    unsafe { Library::new(&library) }.unwrap()
}

/// A thread an element of `columns` times `rows`, in blocks of `threads`.
fn run(name: &str, (columns, rows): (usize, usize), threads: usize, args: &[Arg]) {
    let kernels = kernels();
    let mut pointers: Vec<*mut c_void> = args
        .iter()
        .map(|arg| match arg {
            Arg::Pointer(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::I32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::I64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Arg::F64(value) => std::ptr::from_ref(value).cast_mut().cast(),
        })
        .collect();
    type Run = unsafe extern "C" fn(u32, u32, u32, *mut *mut c_void) -> i32;
    // SAFETY: `build` wrote this function with this type; the arguments are those that the kernel declares, and live until it returns.
    let failed = unsafe {
        let run: libloading::Symbol<'_, Run> = kernels.get(format!("run_{name}")).unwrap();
        run(
            columns.div_ceil(threads) as u32,
            rows as u32,
            threads as u32,
            pointers.as_mut_ptr(),
        )
    };
    assert_eq!(failed, 0, "{name} could not be launched");
}
