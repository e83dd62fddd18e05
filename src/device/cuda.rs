//! The CUDA side: launches of our kernels, products by cuBLAS, factorizations by cuSOLVER. Everything goes to the device's one stream, so
//! that what is launched first is done first; only a copy to the host waits.

use super::operands::{Matrix, Operands};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{self, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, sys as driver,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use cudarc::cusolver::{DnHandle, sys as solver};
use half::{bf16, f16};
use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

/// Threads of a block where a kernel does not ask for another number.
const THREADS: u32 = 256;

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    name: &'static str,
    ptx: &'static str,
}

macro_rules! module {
    ($name:ident, $file:literal) => {
        pub(crate) const $name: Module = Module {
            name: concat!("quantflow-", $file),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")),
        };
    };
}
module!(CODES, "codes");
module!(FORWARD, "forward");
module!(SUMS, "sums");
module!(MATRICES, "matrices");
module!(SOLVER, "solver");

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// See [`address`].
    Pointer(u64),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
}

/// `value` as a kernel takes it.
///
/// # Errors
/// It needs more than 32 bits.
pub(crate) fn u32_arg(value: usize) -> Result<Arg> {
    match u32::try_from(value) {
        Ok(value) => Ok(Arg::U32(value)),
        Err(_) => bail!("{value} is too large for a kernel"),
    }
}

/// How kernels name a dtype: see kernel.h.
pub(crate) fn kind(dtype: DType) -> Result<Arg> {
    Ok(Arg::I32(match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
        other => bail!("no kernel for {other:?}"),
    }))
}

/// A thread an element of `columns` times `rows`, in blocks of so many threads along the columns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Threads {
    pub(crate) columns: usize,
    pub(crate) rows: usize,
    pub(crate) block: u32,
}

impl Threads {
    pub(crate) fn over(columns: usize, rows: usize) -> Self {
        Self {
            columns,
            rows,
            block: THREADS,
        }
    }

    /// As [`Self::over`] for any number of rows, which are the grid's first side: `thread_y` in kernel.h is a thread's column.
    pub(crate) fn by_row(columns: usize, rows: usize) -> Self {
        let block = THREADS as usize;
        Self::over(rows * block, columns.div_ceil(block))
    }

    fn config(self) -> Result<LaunchConfig> {
        let blocks = u32::try_from(self.columns.div_ceil(self.block as usize)).ok();
        // The second side of a grid has 16 bits.
        let rows = u16::try_from(self.rows).ok();
        match (blocks, rows) {
            (Some(blocks), Some(rows)) => Ok(LaunchConfig {
                grid_dim: (blocks, u32::from(rows), 1),
                block_dim: (self.block, 1, 1),
                shared_mem_bytes: 0,
            }),
            _ => bail!("{} x {} are too many for a grid", self.columns, self.rows),
        }
    }
}

/// Runs a kernel.
pub(crate) fn launch(
    device: &CudaDevice,
    module: Module,
    name: &str,
    threads: Threads,
    args: &[Arg],
) -> Result<()> {
    if threads.columns == 0 || threads.rows == 0 {
        return Ok(());
    }
    let function = device
        .get_or_load_custom_func(name, module.name, module.ptx)?
        .into_cuda_function();
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for arg in args {
        match arg {
            Arg::Pointer(value) | Arg::U64(value) => builder.arg(value),
            Arg::U32(value) => builder.arg(value),
            Arg::I32(value) => builder.arg(value),
            Arg::I64(value) => builder.arg(value),
            Arg::F32(value) => builder.arg(value),
            Arg::F64(value) => builder.arg(value),
        };
    }
    // SAFETY: each caller gives the arguments that its kernel declares, with addresses of tensors that it holds and whose shapes it
    // has checked; they are freed on the same stream, so not before the kernel has run.
    unsafe { builder.launch(threads.config()?) }.w()?;
    Ok(())
}

/// Where the first element of a contiguous part of a storage is on the device.
pub(crate) fn address(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    if !layout.is_contiguous() {
        bail!("this operation needs contiguous tensors");
    }
    start(storage, layout)
}

/// As [`address`], whatever the strides.
fn start(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    fn of<T>(slice: &CudaSlice<T>) -> u64 {
        let stream = slice.stream();
        slice.device_ptr(stream).0
    }
    let base = match &storage.slice {
        CudaStorageSlice::U8(slice) => of(slice),
        CudaStorageSlice::U32(slice) => of(slice),
        CudaStorageSlice::I64(slice) => of(slice),
        CudaStorageSlice::BF16(slice) => of(slice),
        CudaStorageSlice::F16(slice) => of(slice),
        CudaStorageSlice::F32(slice) => of(slice),
        CudaStorageSlice::F64(slice) => of(slice),
        _ => bail!("no kernel for {:?}", storage.dtype()),
    };
    Ok(base + (layout.start_offset() * storage.dtype().size_in_bytes()) as u64)
}

/// [`address`] of a tensor.
fn address_of(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => address(storage, layout),
        _ => bail!("a tensor is not on the device"),
    }
}

/// [`address_of`], as an argument.
pub(crate) fn pointer(tensor: &Tensor) -> Result<Arg> {
    Ok(Arg::Pointer(address_of(tensor)?))
}

/// [`address`] of a part of a storage, as an argument.
pub(crate) fn pointer_at(storage: &CudaStorage, layout: &Layout) -> Result<Arg> {
    Ok(Arg::Pointer(address(storage, layout)?))
}

/// The product of two matrices, or of two batches: f64 in f64, everything else summed in f32.
pub(crate) fn product(
    lhs: (&CudaStorage, &Layout),
    rhs: (&CudaStorage, &Layout),
    operands: Operands,
) -> Result<CudaStorage> {
    let count = operands.batch * operands.rows() * operands.columns();
    let out = match lhs.0.dtype() {
        DType::F64 => wrapped::<f64>(&lhs.0.device, count)?,
        _ => wrapped::<f32>(&lhs.0.device, count)?,
    };
    product_to((&out, &Layout::contiguous(count)), lhs, rhs, operands)?;
    Ok(out)
}

/// As [`product`], written to `out`, which is contiguous.
pub(crate) fn product_to(
    out: (&CudaStorage, &Layout),
    lhs: (&CudaStorage, &Layout),
    rhs: (&CudaStorage, &Layout),
    operands: Operands,
) -> Result<()> {
    let device = &lhs.0.device;
    let places = [address(out.0, out.1)?, start(lhs.0, lhs.1)?, start(rhs.0, rhs.1)?];
    let f32_sums = |input| gemm(device, places, operands, input, [1f32, 0.0]);
    match [lhs.0.dtype(), rhs.0.dtype(), out.0.dtype()] {
        [DType::BF16, DType::BF16, DType::F32] => f32_sums(blas::cudaDataType::CUDA_R_16BF),
        [DType::F16, DType::F16, DType::F32] => f32_sums(blas::cudaDataType::CUDA_R_16F),
        [DType::F32, DType::F32, DType::F32] => f32_sums(f32::KIND),
        [DType::F64, DType::F64, DType::F64] => gemm(device, places, operands, f64::KIND, [1.0, 0.0]),
        [lhs, rhs, _] => bail!("no product of {lhs:?} and {rhs:?}"),
    }
}

/// `out -= lhs · rhs`, f64 parts of one storage.
pub(crate) fn subtract_product(storage: &CudaStorage, layout: &Layout, operands: Operands) -> Result<()> {
    let out = address(storage, layout)?;
    let base = start(storage, &Layout::contiguous(0))?;
    let at = |matrix: Matrix| base + (matrix.offset * size_of::<f64>()) as u64;
    let places = [out, at(operands.lhs), at(operands.rhs)];
    gemm(&storage.device, places, operands, f64::KIND, [-1.0, 1.0])
}

/// A type that products are summed in.
trait Summed {
    const KIND: blas::cudaDataType;
    const COMPUTE: blas::cublasComputeType_t;
}

impl Summed for f32 {
    const KIND: blas::cudaDataType = blas::cudaDataType::CUDA_R_32F;
    const COMPUTE: blas::cublasComputeType_t = blas::cublasComputeType_t::CUBLAS_COMPUTE_32F;
}

impl Summed for f64 {
    const KIND: blas::cudaDataType = blas::cudaDataType::CUDA_R_64F;
    const COMPUTE: blas::cublasComputeType_t = blas::cublasComputeType_t::CUBLAS_COMPUTE_64F;
}

/// `out = factor · lhs · rhs + kept · out`, for the addresses of `out`, whose rows are contiguous, `lhs` and `rhs`, matrices of the type `input`.
fn gemm<T: Summed>(
    device: &CudaDevice,
    [out, lhs, rhs]: [u64; 3],
    operands: Operands,
    input: blas::cudaDataType,
    [factor, kept]: [T; 2],
) -> Result<()> {
    let (m, n, k) = (operands.rows(), operands.columns(), operands.inner());
    // cuBLAS counts by columns, so that it sees each matrix transposed: (A B)ᵀ = Bᵀ Aᵀ.
    // SAFETY: the operands lie within their storages: `Operands` was made of their layouts; the output is as large as the product.
    unsafe {
        cublas::result::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            operation(operands.rhs),
            operation(operands.lhs),
            int(n)?,
            int(m)?,
            int(k)?,
            (&raw const factor).cast(),
            rhs as *const c_void,
            input,
            int(operands.rhs.leading())?,
            operands.rhs.batch_stride as i64,
            lhs as *const c_void,
            input,
            int(operands.lhs.leading())?,
            operands.lhs.batch_stride as i64,
            (&raw const kept).cast(),
            out as *mut c_void,
            T::KIND,
            int(n)?,
            (m * n) as i64,
            int(operands.batch)?,
            T::COMPUTE,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .w()
}

/// Memory that a kernel will fill.
pub(crate) fn wrapped<T>(device: &CudaDevice, count: usize) -> Result<CudaStorage>
where
    T: CudaDType + DeviceRepr,
{
    // SAFETY: every caller writes all of it before it is read.
    let slice = unsafe { device.alloc::<T>(count) }?;
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// Memory of a floating-point dtype that a kernel will fill.
pub(crate) fn floats(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaStorage> {
    match dtype {
        DType::F32 => wrapped::<f32>(device, count),
        DType::BF16 => wrapped::<bf16>(device, count),
        DType::F16 => wrapped::<f16>(device, count),
        other => bail!("no kernel for {other:?}"),
    }
}

fn operation(matrix: Matrix) -> blas::cublasOperation_t {
    match matrix.is_transposed() {
        true => blas::cublasOperation_t::CUBLAS_OP_T,
        false => blas::cublasOperation_t::CUBLAS_OP_N,
    }
}

fn int(value: usize) -> Result<i32> {
    match i32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("{value} is too large for cuBLAS"),
    }
}

/// In place: the lower Cholesky factor of `matrix`, `[width, width]` f64 by its lower half; or the row of the pivot that is not positive.
pub(crate) fn cholesky(matrix: &CudaStorage, layout: &Layout) -> Result<Option<usize>> {
    let (width, _) = layout.shape().dims2()?;
    let device = &matrix.device;
    let at = address(matrix, layout)? as *mut c_void;
    let kind = solver::cudaDataType::CUDA_R_64F;
    // By columns, the lower half of a row-major matrix is the upper half of its transpose.
    let half = solver::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
    let info = device.alloc_zeros::<i32>(1)?;
    with_solver(device, |handle| {
        let (mut device_bytes, mut host_bytes) = (0, 0);
        // SAFETY: the sizes are those of the matrix; the workspaces are as large as cuSOLVER asks and outlive the call on the stream.
        unsafe {
            let mut options = std::ptr::null_mut();
            solver::cusolverDnCreateParams(&raw mut options)
                .result()
                .map_err(candle_core::Error::wrap)?;
            solver::cusolverDnXpotrf_bufferSize(
                handle.cu(),
                options,
                half,
                width as i64,
                kind,
                at,
                width as i64,
                kind,
                &raw mut device_bytes,
                &raw mut host_bytes,
            )
            .result()
            .map_err(candle_core::Error::wrap)?;
            let work = device.alloc::<u8>(device_bytes.max(1))?;
            let mut host = vec![0u8; host_bytes.max(1)];
            let stream = device.cuda_stream();
            solver::cusolverDnXpotrf(
                handle.cu(),
                options,
                half,
                width as i64,
                kind,
                at,
                width as i64,
                kind,
                work.device_ptr(&stream).0 as *mut c_void,
                device_bytes,
                host.as_mut_ptr().cast(),
                host_bytes,
                info.device_ptr(&stream).0 as *mut i32,
            )
            .result()
            .map_err(candle_core::Error::wrap)?;
            stream.synchronize().w()?;
            solver::cusolverDnDestroyParams(options)
                .result()
                .map_err(candle_core::Error::wrap)
        }
    })?;
    match device.clone_dtoh(&info)?[0] {
        0 => Ok(None),
        pivot if pivot > 0 => Ok(Some(pivot as usize - 1)),
        argument => bail!("cuSOLVER refused argument {}", -argument),
    }
}

/// In place: `L⁻¹ values`, or with `transposed` `L⁻ᵀ values`, for `lower` `[width, width]` and `values` `[width, lanes]`, whose rows need not
/// touch, f64.
pub(crate) fn triangular_solve(
    values: (&CudaStorage, &Layout),
    lower: &Tensor,
    transposed: bool,
) -> Result<()> {
    let (width, lanes) = values.1.shape().dims2()?;
    let device = &values.0.device;
    let triangle = address_of(lower)?;
    let at = start(values.0, values.1)?;
    let one = 1f64;
    // By columns cuBLAS sees valuesᵀ, `[lanes, width]`, and U = Lᵀ: L x = b is xᵀ U = bᵀ, and Lᵀ x = b is xᵀ Uᵀ = bᵀ.
    // SAFETY: both matrices have the sizes that are given, and are on the device.
    unsafe {
        blas::cublasDtrsm_v2(
            *device.cublas_handle().handle(),
            blas::cublasSideMode_t::CUBLAS_SIDE_RIGHT,
            blas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
            match transposed {
                true => blas::cublasOperation_t::CUBLAS_OP_T,
                false => blas::cublasOperation_t::CUBLAS_OP_N,
            },
            blas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
            int(lanes)?,
            int(width)?,
            &raw const one,
            triangle as *const f64,
            int(width)?,
            at as *mut f64,
            int(super::row_stride(values.1)?)?,
        )
        .result()
        .w()
    }
}

/// Once a device, before the first tensor: freed memory stays with the process, to be taken again without waiting, and uses are not tracked by
/// events.
pub(crate) fn prepare(device: &CudaDevice) -> Result<()> {
    // SAFETY: all work on the device goes to its one stream, in which what is freed is freed after its last use.
    unsafe { device.disable_event_tracking() };
    keep_freed(default_pool(device)?)
}

/// Freed memory stays with the pool.
fn keep_freed(pool: driver::CUmemoryPool) -> Result<()> {
    let (threshold, mut forever) = (
        driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
        u64::MAX,
    );
    // SAFETY: the attribute is a 64-bit number.
    unsafe { driver::cuMemPoolSetAttribute(pool, threshold, (&raw mut forever).cast()) }
        .result()
        .w()
}

/// As its maker calls it.
pub(crate) fn name(device: &CudaDevice) -> String {
    let name = device.cuda_stream().context().name();
    name.unwrap_or_else(|_| "a CUDA device".into())
}

/// Bytes that nobody has taken, or that this process holds ready.
pub(crate) fn free_bytes(device: &CudaDevice) -> u64 {
    let stream = device.cuda_stream();
    let free = stream.context().mem_get_info().map_or(0, |(free, _)| free as u64);
    let of = |attribute| total(device, attribute).unwrap_or(0);
    let held = of(driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    free + held.saturating_sub(of(driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT))
}

/// Most bytes that tensors took so far; those that other streams filled and those of the device's own, each at its most.
pub(crate) fn peak_bytes(device: &CudaDevice) -> u64 {
    total(device, driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH).unwrap_or(0)
}

/// See [`super::Placement::empty_pools`].
pub(crate) fn empty_pools(device: &CudaDevice, most: u64) -> Result<()> {
    if total(
        device,
        driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
    )? <= most
    {
        return Ok(());
    }
    device.cuda_stream().synchronize().w()?;
    for pool in pools(device)? {
        // SAFETY: the pool lives as long as the process.
        unsafe { driver::cuMemPoolTrimTo(pool, 0) }.result().w()?;
    }
    Ok(())
}

/// Memory that another stream than the device's own will fill. It comes from a pool of its own: what is taken and left at other times than the
/// tensors of the device's stream would tear holes between them.
pub(crate) fn alloc_beside(
    device: &CudaDevice,
    stream: &Arc<CudaStream>,
    bytes: usize,
) -> Result<CudaSlice<u8>> {
    let pool = beside_pool(device)?;
    let mut place = 0;
    stream.context().bind_to_thread().w()?;
    // SAFETY: the pool lives as long as the process; the memory has one owner, who reads it after it has been written.
    unsafe {
        driver::cuMemAllocFromPoolAsync(&raw mut place, bytes, pool, stream.cu_stream())
            .result()
            .w()?;
        Ok(stream.upgrade_device_ptr(place, bytes))
    }
}

/// A pool of [`alloc_beside`], which lives as long as the process.
struct Beside {
    device: driver::CUdevice,
    pool: driver::CUmemoryPool,
}

// SAFETY: pools may be used on every thread.
unsafe impl Send for Beside {}

static BESIDE: Mutex<Vec<Beside>> = Mutex::new(Vec::new());

fn beside_pool(device: &CudaDevice) -> Result<driver::CUmemoryPool> {
    let device = device.cuda_stream().context().cu_device();
    let mut made = BESIDE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(beside) = made.iter().find(|beside| beside.device == device) {
        return Ok(beside.pool);
    }
    // SAFETY: zeros are values of all its fields.
    let mut properties: driver::CUmemPoolProps = unsafe { std::mem::zeroed() };
    properties.allocType = driver::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    let on_device = driver::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as c_int;
    let mut pool = std::ptr::null_mut();
    // SAFETY: a location is a kind and a number, whose names differ from version to version; both are there while the pool is made.
    unsafe {
        (&raw mut properties.location)
            .cast::<[c_int; 2]>()
            .write([on_device, device]);
        driver::cuMemPoolCreate(&raw mut pool, &raw const properties)
    }
    .result()
    .w()?;
    keep_freed(pool)?;
    made.push(Beside { device, pool });
    Ok(pool)
}

fn default_pool(device: &CudaDevice) -> Result<driver::CUmemoryPool> {
    let stream = device.cuda_stream();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the context's device is open.
    unsafe { driver::cuDeviceGetDefaultMemPool(&raw mut pool, stream.context().cu_device()) }
        .result()
        .w()?;
    Ok(pool)
}

/// All pools of a device.
fn pools(device: &CudaDevice) -> Result<[driver::CUmemoryPool; 2]> {
    Ok([default_pool(device)?, beside_pool(device)?])
}

/// An attribute of all pools, which is a number of bytes.
fn total(device: &CudaDevice, attribute: driver::CUmemPool_attribute) -> Result<u64> {
    let values = pools(device)?.into_iter().map(|pool| {
        let mut value = 0u64;
        // SAFETY: the attributes that are asked for are 64-bit numbers.
        unsafe { driver::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) }
            .result()
            .w()
            .map(|()| value)
    });
    values.sum()
}

/// One cuSOLVER handle a thread: making one takes longer than a small factorization.
fn with_solver<T>(device: &CudaDevice, work: impl FnOnce(&DnHandle) -> Result<T>) -> Result<T> {
    thread_local! {
        static HANDLE: RefCell<Option<DnHandle>> = const { RefCell::new(None) };
    }
    HANDLE.with_borrow_mut(|kept| {
        let stream = device.cuda_stream();
        if kept
            .as_ref()
            .is_none_or(|handle| handle.stream().cu_stream() != stream.cu_stream())
        {
            *kept = Some(DnHandle::new(stream).map_err(candle_core::Error::wrap)?);
        }
        kept.as_ref().map_or_else(|| bail!("no cuSOLVER handle"), work)
    })
}
