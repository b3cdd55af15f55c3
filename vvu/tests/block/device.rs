//! The disk is a block device: a loop device, for which the tests have to run as root.

use std::path::PathBuf;
use std::process::Command;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::common::{Setup, config_u16, config_u64, disk, pattern};
use crate::{DATA, DIRECT, IO_ERROR, OK, memory, start};

/// A loop device and the file behind it.
struct Loop {
    path: PathBuf,
    backing: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    /// A device with `content` and sectors of so many bytes; `None` where this user may make none.
    fn attach(content: &[u8], sector: u32) -> Option<Self> {
        let (dir, backing) = disk(content).expect("file");
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(&backing)
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).expect("a path").trim_end().into();
                Some(Self { path, backing, _dir: dir })
            }
            result => {
                eprintln!("not tested, since there are no loop devices: {result:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The kernel does it when the last one who uses the device closes it.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

fn range(sector: u64, sectors: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat()
}

#[test]
fn a_block_device_says_what_its_blocks_are_and_takes_any_sector() {
    for sector in [512, 4096] {
        let mut content = pattern(60, 1 << 20);
        let Some(device) = Loop::attach(&content, sector) else { return };
        let backend = start(&[0; 512], |options| options.path.clone_from(&device.path));
        let memory = memory();
        let mut driver = backend.connect(&memory, Setup::default());
        assert_ne!(driver.offered & 1 << VIRTIO_BLK_F_TOPOLOGY, 0);
        assert_eq!(config_u64(&driver.config, 0), 2048, "capacity in sectors");
        let block = u32::from_le_bytes(driver.config[20..24].try_into().expect("four bytes"));
        assert_eq!(block, if DIRECT { sector } else { 512 });
        assert_eq!(block << driver.config[24], sector, "physical block");
        assert_eq!((driver.config[25], u32::from(config_u16(&driver.config, 26)) * block), (0, sector));

        assert_eq!(driver.read(0, 0, DATA, 1 << 20), content);
        // Parts of blocks, from memory that is aligned to nothing.
        for (at, len, address) in [(1, 1, 0), (7, 2, 3), (9, 6, 512), (16, 8, 4096), (255, 70, 7)] {
            let data = pattern(61 + at, len * 512);
            driver.write(0, at, DATA + address, &data);
            let from = usize::try_from(at).expect("small") * 512;
            content[from..from + data.len()].copy_from_slice(&data);
            assert_eq!(driver.read(0, at, DATA + 0x10_0001, u32::try_from(data.len()).expect("small")), data);
        }
        for (kind, at, sectors) in [
            (VIRTIO_BLK_T_WRITE_ZEROES, 513, 30),
            (VIRTIO_BLK_T_WRITE_ZEROES, 640, 64),
            (VIRTIO_BLK_T_DISCARD, 1024, 64),
        ] {
            memory.write(DATA, &range(at, sectors));
            assert_eq!(driver.request(0, kind, 0, &[(DATA, 16)]), OK);
            let from = usize::try_from(at).expect("small") * 512;
            content[from..from + sectors as usize * 512].fill(0);
        }
        memory.write(DATA, &range(1, 3));
        assert_eq!(
            driver.request(0, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)]),
            OK,
            "part of a block is a hint"
        );
        driver.flush(0);
        // A discarded range may read as anything.
        let got = driver.read(0, 8, DATA, (1 << 20) - 4096);
        assert!(got == content[4096..], "blocks of {sector}");
        drop(driver);
        backend.end();
        assert!(std::fs::read(&device.backing).expect("file")[4096..] == content[4096..]);
    }
}

#[test]
fn a_block_device_that_shrinks_gives_errors() {
    let content = pattern(70, 1 << 20);
    let Some(device) = Loop::attach(&content, 512) else { return };
    let backend = start(&[0; 512], |options| options.path.clone_from(&device.path));
    let memory = memory();
    let mut driver = backend.connect(&memory, Setup::default());
    driver.flush(0);
    let file = std::fs::File::options().write(true).open(&device.backing).expect("file");
    file.set_len(512 << 10).expect("shrink");
    let told = Command::new("losetup").arg("--set-capacity").arg(&device.path).status().expect("losetup");
    assert!(told.success());
    assert_eq!(driver.request(0, VIRTIO_BLK_T_IN, 1500, &[(DATA, 4096)]), IO_ERROR);
    assert_eq!(driver.read(0, 0, DATA, 4096), content[..4096]);
    drop(driver);
    backend.end();
}
