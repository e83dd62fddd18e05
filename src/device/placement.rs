//! Which device a run uses.

use crate::error::{Error, Result};
use crate::numerics;
use candle_core::{DType, Device};
use safetensors::Dtype;
use std::str::FromStr;

/// `--device`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device where this build and this machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let hint = || format!("{text} is no device: use auto, cpu, cuda or cuda:1");
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => {
                let index = other.strip_prefix("cuda:").ok_or_else(hint)?;
                index.parse().map(Self::Cuda).map_err(|_| hint())
            }
        }
    }
}

/// Where tensors are, and whether the programs of [`crate::device`] work on them or the CPU's own kernels.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Where tensors are.
    pub device: Device,
    /// Sums, factors and codes are made where the tensors are, and linears take their inputs in the model's own dtype. On a CUDA device
    /// always; on the CPU for tests: what runs on a device then runs there, operation for operation.
    pub on_device: bool,
}

impl From<Device> for Placement {
    fn from(device: Device) -> Self {
        let on_device = !device.is_cpu();
        Self { device, on_device }
    }
}

impl Placement {
    /// The CPU and its own kernels.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            on_device: false,
        }
    }

    /// The CPU as a device would be used.
    pub fn cpu_as_device() -> Self {
        Self {
            device: Device::Cpu,
            on_device: true,
        }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// It is not there, or not in this build.
    pub fn open(choice: DeviceChoice) -> Result<Self> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::cpu()),
            DeviceChoice::Auto => Ok(cuda(0).unwrap_or_else(|why| {
                tracing::debug!("on the CPU: {why}");
                Self::cpu()
            })),
            DeviceChoice::Cuda(index) => cuda(index).map_err(|why| {
                let hint = "use --device cpu, or --device auto, which takes what is there";
                Error::usage("--device", format!("cuda:{index} cannot be used: {why}"), hint)
            }),
        }
    }

    /// Workers of a dataflow whose work is done here, where `wanted` were asked for: on a device one, which does no more than to keep it busy.
    pub fn workers(&self, wanted: usize) -> usize {
        match self.on_device {
            true => 1,
            false => wanted,
        }
    }

    /// What rounds alike: sums whose batches were run by the same are the same bits.
    pub fn arithmetic(&self) -> String {
        match (&self.device, self.on_device) {
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), _) => super::cuda::name(device),
            (_, true) => format!("as on a device, {}", numerics::arithmetic()),
            _ => numerics::arithmetic(),
        }
    }

    /// Bytes that are free on the device; no bound on the CPU.
    pub fn available_bytes(&self) -> u64 {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => super::cuda::free_bytes(device),
            _ => u64::MAX,
        }
    }

    /// Bytes that activations may take on the device in a run that has no plan for it: half of `budget`, or else of what is free there.
    pub fn activation_bytes(&self, budget: Option<u64>) -> usize {
        match self.on_device {
            true => (budget.unwrap_or_else(|| self.available_bytes()) / 2) as usize,
            false => 0,
        }
    }

    /// Most bytes that were taken on the device so far; 0 on the CPU.
    pub fn peak_bytes(&self) -> u64 {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => super::cuda::peak_bytes(device),
            _ => 0,
        }
    }

    /// Gives back what the device's pools hold and no tensor takes, where they hold more than `most` bytes. Then waits for the device.
    ///
    /// # Errors
    /// The device fails.
    pub fn empty_pools(&self, most: u64) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            super::cuda::empty_pools(device, most)?;
        }
        let _ = most;
        Ok(())
    }

    /// The dtype in which linears take inputs and weights, of a model whose weights are stored so.
    pub fn precision(&self, stored: Dtype) -> DType {
        match (self.on_device, stored) {
            (true, Dtype::BF16) => DType::BF16,
            (true, Dtype::F16) => DType::F16,
            _ => DType::F32,
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> std::result::Result<Placement, String> {
    // A stream of its own: candle's default is another one in each thread.
    let device = Device::new_cuda_with_stream(index).map_err(|error| first_line(&error))?;
    if let Device::Cuda(device) = &device {
        super::cuda::prepare(device).map_err(|error| first_line(&error))?;
    }
    Ok(Placement {
        device,
        on_device: true,
    })
}

#[cfg(feature = "cuda")]
fn first_line(error: &candle_core::Error) -> String {
    match error {
        // With RUST_BACKTRACE set. To print it, the whole of the binary's debug information is read: 160 MB that no plan knows of.
        candle_core::Error::WithBacktrace { inner, .. } => first_line(inner),
        other => other.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> std::result::Result<Placement, String> {
    Err("this binary was built without the feature `cuda`".into())
}
