//! Stand-ins for the CUDA libraries, so that one binary serves machines with and without a GPU. candle links
//! the libraries, and a program that is linked to a library does not start where it is missing. So the linker
//! finds ours first: archives of the same functions, which open the real library at the first call
//! (library.c).

#![allow(clippy::disallowed_methods)] // src/storage.rs is not here

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A library that cudarc links: its name, the module of cudarc that declares its functions, what the loader
/// knows it by, of CUDA 12 and of CUDA 13 (another number is another interface, so no other is tried), and
/// what its functions return where it is missing: "no device" of the driver, else "not initialized" or the
/// like.
type Library = (&'static str, &'static str, [&'static str; 2], &'static str);

#[rustfmt::skip]
const LIBRARIES: [Library; 7] = [
    ("cuda", "driver", ["libcuda.so.1"; 2], "100"),
    ("nvrtc", "nvrtc", ["libnvrtc.so.12", "libnvrtc.so.13"], "11"),
    ("curand", "curand", ["libcurand.so.10"; 2], "101"),
    ("cublas", "cublas", ["libcublas.so.12", "libcublas.so.13"], "1"),
    ("cublasLt", "cublaslt", ["libcublasLt.so.12", "libcublasLt.so.13"], "1"),
    ("cusparse", "cusparse", ["libcusparse.so.12"; 2], "1"),
    ("cusolver", "cusolver", ["libcusolver.so.11", "libcusolver.so.12"], "1"),
];

/// Makes the stand-ins where they work. Elsewhere, or where something is not as expected, the libraries are
/// linked as they are.
pub(crate) fn archives(nvcc: &Path, out: &Path) {
    println!("cargo::rerun-if-changed=src/device/libraries");
    println!("cargo::rerun-if-changed=Cargo.lock");
    let target = |key: &str| env::var(key).unwrap_or_default();
    let arch = target("CARGO_CFG_TARGET_ARCH");
    if target("CARGO_CFG_TARGET_OS") != "linux" || !["x86_64", "aarch64"].contains(&arch.as_str()) {
        return;
    }
    let folder = out.join("libraries");
    match make(nvcc, &folder) {
        // Cargo puts folders of the build before all others.
        Ok(()) => println!("cargo::rustc-link-search=native={}", folder.display()),
        Err(why) => println!("cargo::warning=the binary will start only where the CUDA libraries are: {why}"),
    }
}

fn make(nvcc: &Path, folder: &Path) -> Result<()> {
    let cudarc = cudarc()?;
    let version = version(nvcc)?;
    fs::create_dir_all(folder)?;
    for (name, module, sonames, missing) in LIBRARIES {
        let bindings = cudarc.join("src").join(module).join("sys/mod.rs");
        println!("cargo::rerun-if-changed={}", bindings.display());
        let declarations = fs::read_to_string(&bindings);
        let declarations = declarations.map_err(|error| format!("{}: {error}", bindings.display()))?;
        let functions = folder.join(name).with_extension("h");
        fs::write(&functions, list(&declarations))?;
        cc::Build::new()
            .cargo_metadata(false)
            .std("gnu11")
            .pic(true)
            .define("SONAME", quoted(sonames[version - 12]).as_str())
            .define("FUNCTIONS", quoted(&functions.display().to_string()).as_str())
            .define("MISSING", missing)
            .define("DRIVER", if name == "cuda" { "1" } else { "0" })
            .file("src/device/libraries/library.c")
            .out_dir(folder)
            .try_compile(name)?;
    }
    // nvcc's own objects call the runtime. Its static form, which is in every toolkit, opens
    // the driver by itself.
    let runtime = "INPUT(-lcudart_static -ldl -lrt -lpthread)\n";
    fs::write(folder.join("libcudart.so"), runtime)?;
    Ok(())
}

/// The functions of cudarc's bindings, whatever the version of CUDA, as library.c wants them.
fn list(bindings: &str) -> String {
    fn declared(line: &str) -> Option<(&str, &str)> {
        // Functions of C are declared, cudarc's own are defined.
        let declaration = line.trim_start().strip_prefix("fn ")?.strip_suffix(';')?;
        let (name, rest) = declaration.split_once('(')?;
        let otherwise = match name {
            "cuGetErrorName" | "cuGetErrorString" => "explain",
            _ if rest.ends_with("c_char") => "text",
            _ => "error",
        };
        Some((name, otherwise))
    }
    let functions: BTreeMap<_, _> = bindings.lines().filter_map(declared).collect();
    let entry = |(index, (name, otherwise))| format!("F({index}, {name}, {otherwise})\n");
    functions.into_iter().enumerate().map(entry).collect()
}

/// Where the source of cudarc is.
fn cudarc() -> Result<PathBuf> {
    let output = Command::new(env::var_os("CARGO").ok_or("cargo sets CARGO")?)
        .args(["metadata", "--format-version=1", "--locked", "--features=cuda"])
        .args(["--filter-platform", &env::var("TARGET")?])
        .output()?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest = packages
        .filter(|package| package["name"] == "cudarc")
        .find_map(|package| package["manifest_path"].as_str())
        .ok_or("cargo metadata does not know cudarc")?;
    Ok(Path::new(manifest)
        .parent()
        .ok_or("a manifest is in a folder")?
        .to_owned())
}

/// The toolkit's major version.
fn version(nvcc: &Path) -> Result<usize> {
    let output = Command::new(nvcc).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let release = text.split_once("release ").map(|(_, rest)| rest);
    let major = release.and_then(|rest| rest.split('.').next()?.parse().ok());
    match major {
        Some(major @ 12..=13) => Ok(major),
        _ => Err(format!("CUDA 12 or 13 was expected, {} says {text}", nvcc.display()).into()),
    }
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}
