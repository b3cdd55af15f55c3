use super::*;
use std::io::Write;
use tempfile::NamedTempFile;

/// A disk with `content`, and its file.
pub(in super::super) fn disk_of(content: &[u8], read_only: bool) -> (NamedTempFile, Disk) {
    let mut file = NamedTempFile::new().expect("file");
    file.write_all(content).expect("content");
    let options = options(file.path(), read_only);
    let disk = Disk::open(&options).expect("disk");
    (file, disk)
}

fn options(path: &Path, read_only: bool) -> Options {
    Options { path: path.to_owned(), read_only, queues: 1, serial: None }
}
