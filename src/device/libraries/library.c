// A stand-in for a CUDA library, which opens the real one at the first call; stand_in.rs builds it once for
// each of them. Its functions are jumps that leave registers and stack as they are, so that nothing here has
// to know what they take.
//
// SONAME is what the loader knows the library by, MISSING the error that its functions return where it is
// not, and FUNCTIONS a file of F(index, name, otherwise): what to call where the real library has no such
// function.

#include <dlfcn.h>
#include <stdio.h>

// What is called instead of a missing function: one that returns an error code, one that returns a text, one
// that gives the text of a code.
static long error(void) { return MISSING; }
__attribute__((unused)) static const char *text(void) { return SONAME " is missing"; }
__attribute__((unused)) static long explain(int code, const char **out) {
    (void)code;
    *out = text();
    return 0;
}

#define F(index, name, otherwise) {#name, (void *)otherwise},
static const struct {
    const char *name;
    void *otherwise;
} functions[] = {
#include FUNCTIONS
};
#undef F

// Where the real functions are; 0 before the first call.
__attribute__((used)) static void *table[sizeof functions / sizeof *functions];

// `used`, here and above, since only the assembly below names them.
__attribute__((used)) static void *resolve(unsigned index) {
    static int told;
    // Opening it once more finds it open.
    void *library = dlopen(SONAME, RTLD_NOW);
    // A machine without the driver has no device, which is no news. One that has the driver alone is worth a
    // line.
    if (!library && !DRIVER && !__atomic_exchange_n(&told, 1, __ATOMIC_RELAXED))
        fprintf(stderr, "no CUDA: %s\n", dlerror());
    void *function = library ? dlsym(library, functions[index].name) : 0;
    if (!function) return functions[index].otherwise;
    __atomic_store_n(&table[index], function, __ATOMIC_RELEASE);
    return function;
}

// A function goes where its place in `table` says. Before the first call that is nowhere: `slow` then takes
// the index, in a register that no call uses, keeps all registers that a call may use for arguments, lets
// `resolve` find the function, and goes there. The names are hidden: they are for this program, not for the
// libraries that it opens.
__asm__(
    ".macro function index, name\n"
    ".pushsection .text\n"
    ".globl \\name\n"
    ".hidden \\name\n"
    ".type \\name, %function\n"
    "\\name:\n"
#if defined(__x86_64__)
    "movq table+8*\\index(%rip), %r11; testq %r11, %r11; je 1f; jmp *%r11\n"
    "1: movl $\\index, %r11d; jmp slow\n"
#elif defined(__aarch64__)
    "adrp x16, table+8*\\index; ldr x16, [x16, :lo12:table+8*\\index]; cbz x16, 1f; br x16\n"
    "1: mov w17, #\\index; b slow\n"
#endif
    ".popsection\n"
    ".endm\n"

    ".pushsection .text\n"
    "slow:\n"
#if defined(__x86_64__)
    "pushq %rbp; movq %rsp, %rbp\n"
    "pushq %rdi; pushq %rsi; pushq %rdx; pushq %rcx; pushq %r8; pushq %r9; pushq %r10; pushq %rax\n"
    "subq $128, %rsp\n"
    "movups %xmm0, (%rsp); movups %xmm1, 16(%rsp); movups %xmm2, 32(%rsp); movups %xmm3, 48(%rsp)\n"
    "movups %xmm4, 64(%rsp); movups %xmm5, 80(%rsp); movups %xmm6, 96(%rsp); movups %xmm7, 112(%rsp)\n"
    "movl %r11d, %edi; call resolve; movq %rax, %r11\n"
    "movups (%rsp), %xmm0; movups 16(%rsp), %xmm1; movups 32(%rsp), %xmm2; movups 48(%rsp), %xmm3\n"
    "movups 64(%rsp), %xmm4; movups 80(%rsp), %xmm5; movups 96(%rsp), %xmm6; movups 112(%rsp), %xmm7\n"
    "addq $128, %rsp\n"
    "popq %rax; popq %r10; popq %r9; popq %r8; popq %rcx; popq %rdx; popq %rsi; popq %rdi\n"
    "popq %rbp; jmp *%r11\n"
#elif defined(__aarch64__)
    "stp x29, x30, [sp, #-224]!; mov x29, sp\n"
    "stp x0, x1, [sp, #16]; stp x2, x3, [sp, #32]; stp x4, x5, [sp, #48]; stp x6, x7, [sp, #64]\n"
    "str x8, [sp, #80]; stp q0, q1, [sp, #96]; stp q2, q3, [sp, #128]\n"
    "stp q4, q5, [sp, #160]; stp q6, q7, [sp, #192]\n"
    "mov w0, w17; bl resolve; mov x16, x0\n"
    "ldp x0, x1, [sp, #16]; ldp x2, x3, [sp, #32]; ldp x4, x5, [sp, #48]; ldp x6, x7, [sp, #64]\n"
    "ldr x8, [sp, #80]; ldp q0, q1, [sp, #96]; ldp q2, q3, [sp, #128]\n"
    "ldp q4, q5, [sp, #160]; ldp q6, q7, [sp, #192]\n"
    "ldp x29, x30, [sp], #224; br x16\n"
#endif
    ".popsection\n");

#define F(index, name, otherwise) __asm__("function " #index ", " #name);
#include FUNCTIONS
