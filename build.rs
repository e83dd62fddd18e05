//! Compiles the CUDA kernels to PTX where the feature `cuda` asks for them; the driver makes machine code of it for the card that it
//! finds. nvcc is `$NVCC`, that of `$CUDA_HOME` or `$CUDA_PATH`, or the one on the path.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

#[cfg(feature = "cuda")]
#[path = "src/device/libraries/stand_in.rs"]
mod stand_in;

const KERNELS: &str = "src/device/kernels";
/// Every card from 2020 on.
const ARCHITECTURE: &str = "compute_80";

fn main() {
    println!("cargo::rerun-if-changed={KERNELS}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let nvcc = nvcc();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in fs::read_dir(KERNELS).expect("the kernels are in the source tree") {
        let source = entry.expect("a readable folder").path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            compile(&nvcc, &source, &out);
        }
    }
    #[cfg(feature = "cuda")]
    stand_in::archives(&nvcc, &out);
}

fn nvcc() -> PathBuf {
    let of = |home: &str| env::var_os(home).map(|home| Path::new(&home).join("bin/nvcc"));
    let found = env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(of);
    found
        .or_else(|| homes.into_iter().find(|path| path.exists()))
        .unwrap_or_else(|| "nvcc".into())
}

fn compile(nvcc: &Path, source: &Path, out: &Path) {
    let name = source.file_stem().expect("a kernel has a name");
    let ptx = out.join(name).with_extension("ptx");
    let status = Command::new(nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch", ARCHITECTURE, "-o"])
        .args([&ptx, source])
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => panic!("{} failed on {}", nvcc.display(), source.display()),
        Err(error) => panic!(
            "{}: {error}; set NVCC or CUDA_HOME to build the feature `cuda`",
            nvcc.display()
        ),
    }
}
