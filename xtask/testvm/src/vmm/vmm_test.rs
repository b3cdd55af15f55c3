use vvu_process::progress::Progress;

use super::*;

#[test]
fn a_vmm_that_is_not_there_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().expect("a directory");
    let progress = Progress::new(true);
    let cache = Cache::open_at(dir.path().join("vvu"), &progress).expect("a cache");
    let error = obtain(&progress, &cache, "nonesuch").expect_err("unknown").to_string();
    assert!(error.contains("known are cloud-hypervisor, debian-12"), "{error}");
    // Where it is installed, it is found.
    if let Err(error) = obtain(&progress, &cache, "cloud-hypervisor") {
        let error = format!("{error:#}");
        assert!(
            error.contains("no cloud-hypervisor in PATH: install one, or let QEMU run the VM"),
            "{error}"
        );
    }
}
