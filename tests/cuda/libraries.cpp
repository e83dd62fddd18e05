// What quantflow and candle call of cuBLAS, cuSOLVER and cuRAND, by definition. As there, matrices are by columns.

#include "device.h"
#include <cmath>
#include <cstring>
#include "types.h"

namespace {

// cudaDataType
enum { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14 };

struct Handle {
    void *stream = nullptr;
};

void *stream_of(void *handle) { return static_cast<Handle *>(handle)->stream; }

size_t size_of(int kind) { return kind == R_32F ? 4 : kind == R_64F ? 8 : 2; }

double value(const void *values, size_t at, int kind) {
    switch (kind) {
        case R_32F: return static_cast<const float *>(values)[at];
        case R_64F: return static_cast<const double *>(values)[at];
        case R_16F: return static_cast<const __half *>(values)[at];
        case R_16BF: return static_cast<const __nv_bfloat16 *>(values)[at];
        default: stop("no product of values of the kind %d", kind);
    }
}

struct Matrix {
    const char *values;
    int kind;
    size_t leading;
    bool transposed;

    double at(size_t row, size_t column) const {
        return value(values, transposed ? row * leading + column : column * leading + row, kind);
    }
    void expect(size_t rows, size_t columns) const {
        if (transposed) std::swap(rows, columns);
        if (leading < rows) stop("a product with rows that overlap");
        expect_live(values, (leading * (columns - 1) + rows) * size_of(kind), "a product");
    }
};

template <typename T>
void multiply(size_t m, size_t n, size_t k, T alpha, const Matrix &a, const Matrix &b, T beta, T *c, size_t leading) {
    std::vector<T> left(m * k), sums(m);
    for (size_t j = 0; j < k; j++)
        for (size_t i = 0; i < m; i++) left[j * m + i] = a.at(i, j);
    for (size_t j = 0; j < n; j++) {
        std::fill(sums.begin(), sums.end(), T(0));
        for (size_t l = 0; l < k; l++) {
            T factor = b.at(l, j);
            for (size_t i = 0; i < m; i++) sums[i] += left[l * m + i] * factor;
        }
        for (size_t i = 0; i < m; i++) {
            T &out = c[j * leading + i];
            out = alpha * sums[i] + (beta == T(0) ? T(0) : beta * out);
        }
    }
}

}  // namespace

extern "C" {

int cublasCreate_v2(void **handle) { return *handle = new Handle, 0; }
int cublasDestroy_v2(void *handle) { return delete static_cast<Handle *>(handle), 0; }
int cublasSetStream_v2(void *handle, void *stream) { return static_cast<Handle *>(handle)->stream = stream, 0; }

int cublasGemmStridedBatchedEx(void *handle, int turn_a, int turn_b, int m, int n, int k, const void *alpha, const void *a, int kind_a,
                               int leading_a, long long stride_a, const void *b, int kind_b, int leading_b, long long stride_b,
                               const void *beta, void *c, int kind_c, int leading_c, long long stride_c, int batch, int compute, int) {
    enum { COMPUTE_32F = 68, COMPUTE_64F = 70 };
    if (compute != (kind_c == R_64F ? COMPUTE_64F : COMPUTE_32F) || (kind_c != R_64F && kind_c != R_32F) || leading_c < m)
        stop("a product into values of the kind %d, summed as %d says", kind_c, compute);
    auto factors = [=](const void *factor) { return value(factor, 0, kind_c); };
    double times = factors(alpha), kept = factors(beta);
    ask(stream_of(handle), [=] {
        for (long long i = 0; i < batch; i++) {
            auto part = [&](const void *values, long long stride, int kind) {
                return static_cast<const char *>(values) + i * stride * static_cast<long long>(size_of(kind));
            };
            Matrix left{part(a, stride_a, kind_a), kind_a, static_cast<size_t>(leading_a), turn_a != 0};
            Matrix right{part(b, stride_b, kind_b), kind_b, static_cast<size_t>(leading_b), turn_b != 0};
            Matrix out{part(c, stride_c, kind_c), kind_c, static_cast<size_t>(leading_c), false};
            left.expect(m, k), right.expect(k, n), out.expect(m, n);
            void *place = const_cast<char *>(out.values);
            if (kind_c == R_64F)
                multiply<double>(m, n, k, times, left, right, kept, static_cast<double *>(place), leading_c);
            else
                multiply<float>(m, n, k, times, left, right, kept, static_cast<float *>(place), leading_c);
        }
    });
    return 0;
}

// B = B U⁻¹, or B U⁻ᵀ: what is asked for.
int cublasDtrsm_v2(void *handle, int side, int half, int turned, int diagonal, int m, int n, const double *alpha, const double *u, int leading_u,
                   double *b, int leading_b) {
    enum { RIGHT = 1, UPPER = 1, NON_UNIT = 0 };
    if (side != RIGHT || half != UPPER || diagonal != NON_UNIT || *alpha != 1.0 || leading_u < n || leading_b < m)
        stop("another triangular solve than is known here");
    ask(stream_of(handle), [=] {
        expect_live(u, (size_t(leading_u) * (n - 1) + n) * 8, "a triangular solve");
        expect_live(b, (size_t(leading_b) * (n - 1) + m) * 8, "a triangular solve");
        auto column = [&](int j) { return b + size_t(j) * leading_b; };
        for (int step = 0; step < n; step++) {
            int j = turned ? n - 1 - step : step;
            for (int done = 0; done < step; done++) {
                int k = turned ? n - 1 - done : done;
                double factor = turned ? u[size_t(k) * leading_u + j] : u[size_t(j) * leading_u + k];
                for (int i = 0; i < m; i++) column(j)[i] -= column(k)[i] * factor;
            }
            for (int i = 0; i < m; i++) column(j)[i] /= u[size_t(j) * leading_u + j];
        }
    });
    return 0;
}

int cusolverDnCreate(void **handle) { return cublasCreate_v2(handle); }
int cusolverDnDestroy(void *handle) { return cublasDestroy_v2(handle); }
int cusolverDnSetStream(void *handle, void *stream) { return cublasSetStream_v2(handle, stream); }
int cusolverDnCreateParams(void **options) { return *options = nullptr, 0; }
int cusolverDnDestroyParams(void *) { return 0; }
int cusolverDnXpotrf_bufferSize(void *, void *, int, int64_t, int, const void *, int64_t, int, size_t *on_device, size_t *on_host) {
    return *on_device = *on_host = 64, 0;
}
// U of A = UᵀU, in the place of A's upper half.
int cusolverDnXpotrf(void *handle, void *, int half, int64_t n, int kind, void *matrix, int64_t leading, int, void *, size_t, void *, size_t,
                     int *info) {
    if (half != 1 || kind != R_64F || leading < n) stop("another Cholesky factorization than is known here");
    ask(stream_of(handle), [=] {
        double *a = static_cast<double *>(matrix);
        expect_live(a, (leading * (n - 1) + n) * 8, "a factorization");
        *info = 0;
        for (int64_t j = 0; j < n && !*info; j++)
            for (int64_t i = 0; i <= j; i++) {
                double left = a[j * leading + i];
                for (int64_t k = 0; k < i; k++) left -= a[i * leading + k] * a[j * leading + k];
                if (i == j && !(left > 0)) *info = static_cast<int>(j + 1);
                a[j * leading + i] = i < j ? left / a[i * leading + i] : std::sqrt(left);
            }
    });
    return 0;
}

int curandCreateGenerator(void **generator, int) { return *generator = nullptr, 0; }
int curandDestroyGenerator(void *) { return 0; }
int curandSetStream(void *, void *) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }

}  // extern "C"
