//! Checks that the host has the memory that VMs ask for.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Memory that the host needs in addition to the VMs, in MiB.
const RESERVE_MIB: u64 = 256;
/// Memory of the VMM itself for each VM, in MiB.
const QEMU_MIB: u64 = 96;

/// Fails if VMs with `ram_mib` in sum do not fit into the memory that is available now.
///
/// The memory of the VMs has no name (memfd), so neither /dev/shm nor a file system limits it.
///
/// # Errors
///
/// The message tells how much is wanted and how much there is.
pub fn ensure_free(ram_mib: u64, vms: usize) -> Result<()> {
    check(ram_mib, vms, free_mib()?)
}

/// Memory that is available to this process, in MiB: that of the host, or less if a cgroup limits it.
///
/// # Errors
///
/// Fails if /proc/meminfo cannot be read.
pub fn free_mib() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let available = available(&meminfo).context("/proc/meminfo has no MemAvailable")?;
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let room = group_room(&membership, Path::new("/sys/fs/cgroup"));
    Ok(room.map_or(available, |room| room.min(available)))
}

/// Memory in MiB that the host must have available for `vms` VMs with `ram_mib` in sum.
#[must_use]
pub fn needed_mib(ram_mib: u64, vms: usize) -> u64 {
    ram_mib.saturating_add(RESERVE_MIB).saturating_add(QEMU_MIB.saturating_mul(vms as u64))
}

/// Fails if a VM cannot hold the files of its initramfs: they go to a file system that takes at most half of its RAM.
///
/// # Errors
///
/// The message names the VM, the size of the files and what to change.
pub fn ensure_files_fit(vm: &str, memory_mib: u64, file_bytes: u64) -> Result<()> {
    let (files, room) = (file_bytes.div_ceil(1 << 20), memory_mib / 2);
    ensure!(
        files <= room,
        "VM {vm}: its files and disks have {files} MiB, but with {memory_mib} MiB of RAM it can hold {room} MiB; \
         raise its memory to {} MiB or make them smaller",
        files.saturating_mul(2)
    );
    Ok(())
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

/// Memory in MiB that the cgroups of this process leave it; `None` if none of them has a limit.
///
/// `membership` is the content of /proc/self/cgroup, `root` the directory of the cgroup file system (version 2).
fn group_room(membership: &str, root: &Path) -> Option<u64> {
    let group = membership.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // The limits of all ancestors hold as well.
    Path::new(group).ancestors().filter_map(|group| room_of(&root.join(group))).min()
}

/// Memory in MiB that one cgroup leaves; `None` if it has no limit.
fn room_of(group: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    // The kernel drops pages of the page cache before it fails an allocation. Shared memory is not among them.
    let stat = read("memory.stat").unwrap_or_default();
    let entry =
        |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cache = ["inactive_file ", "active_file "].into_iter().filter_map(entry).sum();
    Some(limit.saturating_sub(used.saturating_sub(cache)) >> 20)
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

    #[test]
    fn page_cache_counts_as_available_and_the_limits_of_ancestors_hold() {
        let root = tempfile::tempdir().expect("a directory");
        let group = root.path().join("a/b");
        fs::create_dir_all(&group).expect("made");
        let write = |dir: &Path, name: &str, text: &str| fs::write(dir.join(name), text).expect("written");
        let mib = |count: u64| (count << 20).to_string();
        let room = || group_room("0::/a/b\n", root.path());
        assert_eq!(room(), None);

        write(&group, "memory.max", &mib(4096));
        write(&group, "memory.current", &mib(3900));
        assert_eq!(room(), Some(196));
        let stat =
            format!("anon 1\nfile {}\ninactive_file {}\nactive_file {}\n", mib(3800), mib(3000), mib(500));
        write(&group, "memory.stat", &stat);
        assert_eq!(room(), Some(3696));

        let parent = root.path().join("a");
        write(&parent, "memory.max", "max");
        write(&parent, "memory.current", &mib(8000));
        assert_eq!(room(), Some(3696));
        write(&parent, "memory.max", &mib(8100));
        assert_eq!(room(), Some(100));
    }

    #[test]
    fn files_that_do_not_fit_into_half_of_the_ram_are_refused_with_the_remedy() {
        ensure_files_fit("device", 512, 256 << 20).expect("fits");
        let error = ensure_files_fit("device", 512, (256 << 20) + 1).expect_err("too large").to_string();
        assert!(
            error.contains("VM device") && error.contains("257 MiB") && error.contains("514 MiB"),
            "{error}"
        );
        ensure_files_fit("device", 512, u64::MAX).expect_err("no overflow");
    }
}
