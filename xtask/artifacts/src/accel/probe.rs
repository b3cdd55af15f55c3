//! Runs the probe's guest code. Nothing here has a deadline: KVM_RUN may hang, so it runs in a process of its own.
#![expect(unsafe_code, reason = "KVM takes the address of guest memory")]

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::finding::{Finding, LEAST_SPEED};
use super::guest::{self, Memory};

/// Shortest time of a loop that is precise enough to be measured.
const LONG_ENOUGH: Duration = Duration::from_millis(5);

/// Smallest number of measurements. The fastest counts; the others shared the CPU with other programs.
const ROUNDS: usize = 5;

/// Time for which a busy machine repeats the measurement until the guest is fast enough; well below the probe's deadline.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Intel's real mode needs three pages that nobody uses; this is where others put them.
const TSS_ADDRESS: usize = 0xfffb_d000;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_SCE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Runs the probe and writes what is found, a JSON object a line, as soon as it is found.
pub(super) fn run(out: &mut impl Write) -> Result<()> {
    let finding = match prove(out) {
        Ok(()) => Finding::Passed,
        Err(error) => Finding::Failed(format!("{error:#}")),
    };
    report(out, &finding)
}

fn report(out: &mut impl Write, finding: &Finding) -> Result<()> {
    serde_json::to_writer(&mut *out, finding)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Takes the guest through its steps.
fn prove(out: &mut impl Write) -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    vm.set_tss_address(TSS_ADDRESS).context("KVM_SET_TSS_ADDR")?;
    let memory = Memory::new();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: memory.host_address(),
    };
    // SAFETY: the memory is page-aligned, of that size, and dropped after `vm` is no longer used.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let mut system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    enter_long_mode(&mut system);
    vcpu.set_sregs(&system).context("KVM_SET_SREGS")?;
    let registers = kvm_regs {
        rip: guest::CODE,
        rsp: guest::STACK_TOP,
        rbx: guest::DATA,
        // Bit 1 is always set.
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&registers).context("KVM_SET_REGS")?;

    for (step, name) in (0..).zip(guest::STEPS) {
        report(out, &Finding::Trying(name.to_owned()))?;
        if step == guest::LOOP {
            let speed = speed(&mut vcpu, &memory).context(name)?;
            report(out, &Finding::Speed(speed))?;
        } else {
            run_to(&mut vcpu, step).context(name)?;
        }
    }
    memory.check().map_err(anyhow::Error::msg)
}

/// The state in which a boot loader leaves a 64-bit CPU to a kernel.
fn enter_long_mode(system: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: guest::CODE_SELECTOR,
        // Execute, read, accessed.
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    // Read, write, accessed.
    let data = kvm_segment { selector: guest::DATA_SELECTOR, type_: 3, db: 1, l: 0, ..code };
    system.cs = code;
    for segment in [&mut system.ds, &mut system.es, &mut system.fs, &mut system.gs, &mut system.ss] {
        *segment = data;
    }
    // A busy 64-bit TSS: VM entry wants one, though nothing here uses it.
    system.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..kvm_segment::default() };
    system.gdt = table(guest::GDT, 8 * 3);
    system.idt = table(guest::IDT, guest::IDT_BYTES);
    system.cr3 = guest::PML4;
    system.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    system.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    system.efer = EFER_SCE | EFER_LME | EFER_LMA;
}

fn table(base: u64, bytes: u16) -> kvm_dtable {
    kvm_dtable { base, limit: bytes - 1, padding: [0; 3] }
}

/// Enters the guest until it announces this step.
fn run_to(vcpu: &mut VcpuFd, step: u8) -> Result<()> {
    let what = match vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(guest::PORT, [done]) if *done == step => return Ok(()),
        VcpuExit::Shutdown => "triple fault".to_owned(),
        VcpuExit::InternalError => "KVM failed to emulate an instruction".to_owned(),
        VcpuExit::FailEntry(reason, _) => format!("the CPU refused to enter the guest, reason {reason:#x}"),
        other => format!("unexpected exit {other:?}"),
    };
    let rip = vcpu.get_regs().map_or(0, |registers| registers.rip);
    bail!("{what} at {:#x} of the guest code", rip.wrapping_sub(guest::CODE))
}

/// Time the host takes for the loop, divided by the time the guest takes.
fn speed(vcpu: &mut VcpuFd, memory: &Memory) -> Result<f64> {
    let mut guest_loop = |iterations| -> Result<Duration> {
        memory.set_iterations(iterations);
        let start = Instant::now();
        run_to(vcpu, guest::LOOP)?;
        Ok(start.elapsed())
    };
    let mut iterations = 1000;
    while guest_loop(iterations)? < LONG_ENOUGH {
        iterations *= 2;
    }
    let (mut in_guest, mut on_host) = (Duration::MAX, Duration::MAX);
    let begin = Instant::now();
    let mut speed = 0.0;
    for round in 1.. {
        in_guest = in_guest.min(guest_loop(iterations)?);
        let start = Instant::now();
        guest::run_loop(iterations);
        on_host = on_host.min(start.elapsed());
        speed = on_host.as_secs_f64() / in_guest.as_secs_f64();
        // A busy host halves a speed or so; only a slow guest is that far below.
        let hopeless = speed < LEAST_SPEED / 10.0;
        let settled = speed >= LEAST_SPEED || hopeless || begin.elapsed() >= PATIENCE;
        if round >= ROUNDS && settled {
            break;
        }
    }
    memory.set_iterations(0);
    Ok(speed)
}
