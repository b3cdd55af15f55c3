//! Whether the host has the memory a scenario asks for.

use std::fs;

use anyhow::{Context, Result, ensure};

/// What the host and the QEMU processes need beside the guests' RAM, in MiB.
const RESERVE_MIB: u64 = 256;
/// QEMU's own memory for each VM, in MiB.
const QEMU_MIB: u64 = 96;

/// Fails if VMs with `ram_mib` in sum do not fit into the memory that is free now.
///
/// The memory of the VMs is anonymous (memfd): neither /dev/shm nor a file system limits it.
///
/// # Errors
///
/// What is wanted and what there is, or the host does not tell.
pub fn ensure_free(ram_mib: u64, vms: usize) -> Result<()> {
    check(ram_mib, vms, free_mib()?)
}

/// Memory that this process may still use, in MiB.
///
/// # Errors
///
/// The host does not tell.
pub fn free_mib() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let available = available(&meminfo).context("/proc/meminfo has no MemAvailable")?;
    Ok(group_room().map_or(available, |group| group.min(available)))
}

/// What the host must have free for `vms` VMs with `ram_mib` in sum, in MiB.
pub fn needed_mib(ram_mib: u64, vms: usize) -> u64 {
    ram_mib.saturating_add(RESERVE_MIB).saturating_add(QEMU_MIB.saturating_mul(vms as u64))
}

fn check(ram_mib: u64, vms: usize, available_mib: u64) -> Result<()> {
    let wanted = needed_mib(ram_mib, vms);
    ensure!(
        wanted <= available_mib,
        "too little memory: {vms} VMs with {ram_mib} MiB in sum need {wanted} MiB of the host and {available_mib} MiB \
         are free; lower `memory_mib` in the scenario or end other programs"
    );
    Ok(())
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

/// What this process's cgroup leaves, in MiB, if it has a limit of its own.
fn group_room() -> Option<u64> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = membership.lines().find_map(|line| line.strip_prefix("0::"))?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup{group}/{name}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    Some(limit.saturating_sub(used) >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_all_counts_and_the_message_has_both_figures() {
        let meminfo = "MemTotal:       24684000 kB\nMemAvailable:    2097152 kB\n";
        assert_eq!(available(meminfo), Some(2048));
        check(1024, 2, 2048).expect("fits");
        let error = check(1 << 20, 2, 2048).expect_err("too much").to_string();
        assert!(error.contains("1048576 MiB") && error.contains("2048 MiB are free"), "{error}");
        check(u64::MAX, 2, 2048).expect_err("no overflow");
    }
}
