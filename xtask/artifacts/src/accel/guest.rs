//! The guest code of the accelerator probe, and the memory it runs in.
//!
//! It does what an ordinary 64-bit kernel does within its first moments and announces each step on an I/O port. The
//! same loop runs on the host for comparison.
#![expect(unsafe_code, reason = "assembly that runs both in a guest and, the loop, on the host")]

use std::arch::global_asm;
use std::ptr::NonNull;
use std::slice;

/// I/O port on which the guest announces the steps it has done.
pub(super) const PORT: u16 = 0x10;

/// Steps of the guest code in order. The guest writes the number of a step to [`PORT`] when the step is done.
pub(super) const STEPS: [&str; 7] = [
    "entering long mode",
    "a timed loop",
    "loading CR3 and GS",
    "int3 and iretq",
    "STAC and CLAC",
    "XSAVE",
    "cmpxchg16b",
];

/// Number of the timed loop, which the guest repeats until it finds no iterations to do.
pub(super) const LOOP: u8 = 1;

/// Bytes of guest memory, from guest physical address 0 and mapped one to one.
pub(super) const MEMORY: usize = 0x1_0000;

/// Guest addresses. The page tables map the first 2 MiB by one large page.
pub(super) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
pub(super) const GDT: u64 = 0x4000;
pub(super) const IDT: u64 = 0x5000;
pub(super) const CODE: u64 = 0x6000;
/// Scratch memory of the guest code, which finds it in RBX.
pub(super) const DATA: u64 = 0x8000;
pub(super) const STACK_TOP: u64 = 0xf000;

/// Offsets from [`DATA`].
const TRAPS: u64 = 0x00;
const PAIR: u64 = 0x10;
const ITERATIONS: u64 = 0x20;
const FXSAVE: u64 = 0x200;

/// Null, 64-bit code, data.
pub(super) const GDT_ENTRIES: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
pub(super) const CODE_SELECTOR: u16 = 8;
pub(super) const DATA_SELECTOR: u16 = 16;
pub(super) const IDT_BYTES: u16 = 256 * 16;

const BREAKPOINT: u64 = 3;

// Register use: R12 points to DATA, as CPUID overwrites RBX.
global_asm!(
    ".pushsection .text.vvu_accel_probe, \"ax\"",
    ".globl vvu_accel_probe_start, vvu_accel_probe_trap, vvu_accel_probe_loop, vvu_accel_probe_end",
    "vvu_accel_probe_start:",
    "  mov r12, rbx",
    "  mov al, 0",
    "  out {port}, al",
    // The host sets the number of iterations while it has the announcement of the step before.
    "8:",
    "  mov rdi, [r12 + {iterations}]",
    "  test rdi, rdi",
    "  jz 9f",
    "  call vvu_accel_probe_loop",
    "  mov al, 1",
    "  out {port}, al",
    "  jmp 8b",
    "9:",
    // A kernel replaces the boot loader's page tables and sets its per-CPU base.
    "  mov rax, cr3",
    "  mov cr3, rax",
    "  mov ecx, 0xc0000101", // MSR_GS_BASE
    "  rdmsr",
    "  wrmsr",
    "  mov al, 2",
    "  out {port}, al",
    // The handler counts; iretq must lead back here.
    "  int3",
    "  mov al, 3",
    "  out {port}, al",
    // CPUID leaf 7, EBX bit 20: supervisor mode access prevention.
    "  mov eax, 7",
    "  xor ecx, ecx",
    "  cpuid",
    "  bt ebx, 20",
    "  jnc 2f",
    "  stac",
    "  clac",
    "2:",
    "  mov al, 4",
    "  out {port}, al",
    // Every CPU in long mode has FXSAVE; leaf 1, ECX bit 26: XSAVE.
    "  fninit",
    "  fxsave64 [r12 + {fxsave}]",
    "  mov eax, 1",
    "  xor ecx, ecx",
    "  cpuid",
    "  bt ecx, 26",
    "  jnc 3f",
    "  mov rax, cr4",
    "  bts rax, 18", // OSXSAVE
    "  mov cr4, rax",
    "  xor ecx, ecx", // XCR0: x87 and SSE
    "  mov eax, 3",
    "  xor edx, edx",
    "  xsetbv",
    "  xsave64 [r12 + {fxsave} + 0x200]",
    "  xrstor64 [r12 + {fxsave} + 0x200]",
    "3:",
    "  mov al, 5",
    "  out {port}, al",
    // Leaf 1, ECX bit 13: cmpxchg16b. Turns (1, 2) into (3, 4), as stores do where it is absent.
    "  mov eax, 1",
    "  xor ecx, ecx",
    "  cpuid",
    "  bt ecx, 13",
    "  jnc 4f",
    "  mov eax, 1",
    "  mov edx, 2",
    "  mov ebx, 3",
    "  mov ecx, 4",
    "  lock cmpxchg16b [r12 + {pair}]",
    "  jmp 5f",
    "4:",
    "  mov qword ptr [r12 + {pair}], 3",
    "  mov qword ptr [r12 + {pair} + 8], 4",
    "5:",
    "  mov al, 6",
    "  out {port}, al",
    "  hlt",
    "",
    // Handler of int3.
    "vvu_accel_probe_trap:",
    "  inc qword ptr [r12 + {traps}]",
    "  iretq",
    "",
    // extern \"C\" fn(iterations: u64): arithmetic, stack and a branch, all of them dependent.
    "vvu_accel_probe_loop:",
    "  mov eax, 1",
    "7:",
    "  imul rax, rax, 0x19660d",
    "  add rax, rdi",
    "  push rax",
    "  pop rdx",
    "  xor rax, rdx",
    "  dec rdi",
    "  jnz 7b",
    "  ret",
    "vvu_accel_probe_end:",
    ".popsection",
    port = const PORT,
    traps = const TRAPS,
    pair = const PAIR,
    iterations = const ITERATIONS,
    fxsave = const FXSAVE,
);

unsafe extern "C" {
    static vvu_accel_probe_start: u8;
    static vvu_accel_probe_trap: u8;
    static vvu_accel_probe_end: u8;
    fn vvu_accel_probe_loop(iterations: u64);
}

/// Runs the loop on the host.
pub(super) fn run_loop(iterations: u64) {
    // The loop counts down to zero before it looks.
    let iterations = iterations.max(1);
    // SAFETY: it follows the C calling convention and touches nothing but its registers and its own stack.
    unsafe { vvu_accel_probe_loop(iterations) }
}

/// The machine code, of which the host runs a part and the guest a copy.
fn code() -> &'static [u8] {
    let start = &raw const vvu_accel_probe_start;
    let length = (&raw const vvu_accel_probe_end).addr() - start.addr();
    // SAFETY: both symbols delimit one piece of the program's text, which is readable and never changes.
    unsafe { slice::from_raw_parts(start, length) }
}

/// Guest memory: page-aligned, and changed by the guest behind the compiler's back, hence never borrowed.
pub(super) struct Memory {
    bytes: NonNull<Pages>,
}

#[repr(C, align(4096))]
struct Pages([u8; MEMORY]);

impl Memory {
    /// Memory with page tables, descriptor tables and the code in place.
    pub(super) fn new() -> Self {
        let memory = Self { bytes: NonNull::from(Box::leak(Box::new(Pages([0; MEMORY])))) };
        let present_and_writable = 3;
        let large = 1 << 7;
        memory.write(PML4, PDPT | present_and_writable);
        memory.write(PDPT, PAGE_DIRECTORY | present_and_writable);
        memory.write(PAGE_DIRECTORY, present_and_writable | large);
        for (address, entry) in (GDT..).step_by(8).zip(GDT_ENTRIES) {
            memory.write(address, entry);
        }
        let trap = CODE + ((&raw const vvu_accel_probe_trap).addr() - code().as_ptr().addr()) as u64;
        // Interrupt gate, present; the offset's upper parts are zero as the code lies low.
        memory.write(IDT + BREAKPOINT * 16, trap | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32);
        for (address, chunk) in (CODE..).step_by(8).zip(code().chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            memory.write(address, u64::from_le_bytes(word));
        }
        memory.write(DATA + PAIR, 1);
        memory.write(DATA + PAIR + 8, 2);
        memory
    }

    /// Address in this process.
    pub(super) fn host_address(&self) -> u64 {
        self.bytes.as_ptr().addr() as u64
    }

    /// Sets the length of the next loop; 0 is the end of loops.
    pub(super) fn set_iterations(&self, iterations: u64) {
        self.write(DATA + ITERATIONS, iterations);
    }

    /// Fails with the reason if a step did not have its effect.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.read(DATA + TRAPS) != 1 {
            return Err("int3 did not reach its handler once");
        }
        // Intel SDM volume 1, 8.1.5: FNINIT leaves the x87 control word at 37FH.
        if self.read(DATA + FXSAVE) & 0xffff != 0x37f {
            return Err("FXSAVE did not store the x87 control word");
        }
        if (self.read(DATA + PAIR), self.read(DATA + PAIR + 8)) != (3, 4) {
            return Err("cmpxchg16b did not exchange");
        }
        Ok(())
    }

    fn word(&self, address: u64) -> *mut u64 {
        let offset = usize::try_from(address).unwrap_or(MEMORY);
        assert!(offset.is_multiple_of(8) && offset <= MEMORY - 8, "{address:#x} is no word of guest memory");
        self.bytes.as_ptr().cast::<u8>().wrapping_add(offset).cast()
    }

    fn read(&self, address: u64) -> u64 {
        // SAFETY: `word` points into the allocation, aligned; the vCPU runs on this thread, so not now.
        unsafe { self.word(address).read_volatile() }
    }

    fn write(&self, address: u64, value: u64) {
        // SAFETY: as in `read`.
        unsafe { self.word(address).write_volatile(value) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the pointer comes from a leaked box and nothing else frees it.
        drop(unsafe { Box::from_raw(self.bytes.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_between_its_neighbours_and_the_loop_returns() {
        assert!((100..=usize::try_from(DATA - CODE).expect("small")).contains(&code().len()));
        assert!(code().len() <= 512, "{} bytes", code().len());
        run_loop(1000);
    }

    #[test]
    fn the_trap_gate_points_at_the_handler() {
        let memory = Memory::new();
        let gate = memory.read(IDT + BREAKPOINT * 16);
        let handler = (gate & 0xffff | gate >> 32 & 0xffff_0000) - CODE;
        let code = &code()[usize::try_from(handler).expect("within the code")..];
        // inc qword ptr [r12]; iretq
        assert_eq!(code[..6], [0x49, 0xff, 0x04, 0x24, 0x48, 0xcf]);
        assert_eq!(memory.check(), Err("int3 did not reach its handler once"));
    }
}
