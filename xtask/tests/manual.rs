//! The manual steps of virtio-vhost-user, command for command, with `--exec` in place of a person.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn vm(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("vm").args(args).current_dir(dir).env("VVU_RUNS", dir.join("target/e2e"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Wants exit code 0 and gives what was printed.
fn succeeded(output: &Output) -> String {
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "stdout: {stdout}\nstderr: {stderr}");
    stdout
}

#[test]
fn the_manual_works_in_two_terminals() {
    /// Binds, serves in the background, and ends when the sibling has written its last word to the disk.
    const DEVICE: &str = "set -e
        lspci -s 00:10.0
        cd /sys/bus/pci
        echo vfio-pci > devices/0000:00:10.0/driver_override
        echo 0000:00:10.0 > drivers/virtio-pci/unbind
        echo 0000:00:10.0 > drivers/vfio-pci/bind
        vvu device block --vfio 0000:00:10.0 --file /disk.img >/dev/ttyS0 2>&1 &
        until dd if=/disk.img bs=512 count=1 2>/dev/null | grep -q 'from the sibling'; do
            kill -0 $!
            sleep 0.2
        done
        free -m | awk '/Mem/ { print $2, \"MiB\" }'";
    const SIBLING: &str = "set -e
        cat /sys/block/vda/size
        dd if=/dev/vda bs=512 skip=2 count=1 2>/dev/null | grep -o 'from the device'
        echo 'from the sibling' | dd of=/dev/vda bs=512 conv=sync,fsync
        exit 3";

    let dir = tempfile::tempdir().expect("a directory");
    let mut disk = vec![0; 1 << 20];
    disk[1024..1039].copy_from_slice(b"from the device");
    std::fs::write(dir.path().join("disk.img"), disk).expect("written");

    let mut device = vm(
        dir.path(),
        &[
            "device",
            "--vvu-proxy",
            "vvu.sock,addr=00:10.0",
            "-m",
            "1024",
            "-p",
            "vfio_iommu_type1.allow_unsafe_interrupts=1",
            "--disk",
            "disk.img",
            "--exec",
            DEVICE,
        ],
    );
    let mut device = device.spawn().expect("xtask starts");
    // The first run may build the programs of the guests.
    let deadline = Instant::now() + Duration::from_secs(280);
    while !dir.path().join("vvu.sock.mem").exists() {
        if Instant::now() > deadline || device.try_wait().expect("looked at").is_some() {
            // Reading the output ends only when the program has ended.
            let _ = device.kill();
            panic!("no proxy: {}", text(&device.wait_with_output().expect("ended").stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let sibling =
        vm(dir.path(), &["sibling", "--vhost-user-blk", "vvu.sock", "-m", "512", "--exec", SIBLING])
            .output()
            .expect("xtask starts");
    let device = device.wait_with_output().expect("ended");

    let (stdout, stderr) = (text(&sibling.stdout), text(&sibling.stderr));
    assert_eq!(sibling.status.code(), Some(3), "stdout: {stdout}\nstderr: {stderr}");
    assert_eq!(stdout, "2048\nfrom the device\n");
    assert!(stderr.contains("1+0 records") || stderr.contains("0+1 records"), "{stderr}");
    let printed = succeeded(&device);
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines[0].starts_with("00:10.0 Unclassified device [00ff]: "), "{printed}");
    let memory: u64 = lines[1].trim_end_matches(" MiB").parse().expect("a number");
    assert!((800..=1024).contains(&memory), "{printed}");
    for name in ["vvu.sock", "vvu.sock.mem", "vvu.sock.vfio"] {
        assert!(!dir.path().join(name).exists(), "{name} is left");
    }
}

#[test]
fn a_sibling_without_its_device_vm_and_a_bad_disk_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let refused = |args: &[&str], want: &[&str]| {
        let output = vm(dir.path(), args).output().expect("xtask starts");
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        for want in want {
            assert!(stderr.contains(want), "{args:?}: {stderr:?} lacks {want:?}");
        }
    };
    refused(&["sibling", "--vhost-user-blk", "s"], &["s.mem", "start the device VM first", "--vvu-proxy"]);
    refused(&["device", "--vvu-proxy", "s", "--disk", "none"], &["--disk none", "No such file"]);
    refused(
        &["device", "--vvu-proxy", "s", "-m", "512", "--disk", "300M"],
        &["VM device", "300 MiB", "600 MiB"],
    );
    refused(&["device", "--vvu-proxy", "s,addr=1"], &["00:10.0"]);
    refused(&["device", "--vvu-proxy", "s", "-m", "99999999"], &["too little memory"]);
    assert!(!dir.path().join("target").exists(), "a run directory was made");
}
