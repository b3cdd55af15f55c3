//! The guest driver, the bridge and the back-end of a device VM, as `vvu device block --vfio` runs them.
//!
//! They run in a thread of the test with a vfio-user client in place of VFIO, whose own calls are left alone.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use vvu::StopToken;
use vvu::backend::block::{BlockBackend, BlockOptions};
use vvu::driver::Driver as GuestDriver;
use vvu::vfio_user::client::VfioUserDevice;

use crate::calls::KINDS;
use crate::common::{DEADLINE, Setup, SiblingMemory, pattern};
use crate::frontend::{Outcome, attempt};
use crate::interceptor::{Filter, Interceptor};
use crate::proxy::{Proxy, RAM};
use crate::walk;

/// Kinds that the stand-in for VFIO uses, or with which the standard library aborts the process, which is that of the
/// test.
fn is_left_out(name: &str) -> bool {
    ["recvmsg", "sendmsg", "mmap", "mprotect"].contains(&name)
}

#[test]
fn the_next_front_end_of_a_device_vm_is_served_whatever_failed_before() {
    walk::each_kind(KINDS, |kind| {
        if is_left_out(kind.0) {
            return;
        }
        // Nothing here fails in the proxy: its filter is for a call that it never makes.
        let proxy = Proxy::ready(Filter::One(libc::SYS_reboot));
        let content = pattern(42, 16 << 10);
        let (_directory, disk) = crate::common::disk(&content).expect("disk");
        let memory = Arc::new(SiblingMemory::of(proxy.memory(), &RAM));
        let stop = StopToken::new().expect("token");
        let (stopped, vmm) = (stop.clone(), proxy.path("vmm"));
        let (sender, ready) = channel();
        let (calls, device_vm) = Interceptor::run(Filter::One(kind.1), move || {
            let block = BlockBackend::open(&BlockOptions::new(disk)).expect("disk");
            let driver = GuestDriver::new(VfioUserDevice::connect(&vmm).expect("proxy")).expect("device");
            let serve = |frontend| {
                block.serve_frontend(frontend, &stopped);
                Ok::<_, String>(())
            };
            vvu::serve(driver, &stopped, || sender.send(()).expect("test"), serve)
        });
        ready.recv_timeout(DEADLINE).expect("ready");
        let setup = Setup { inflight: true, ..Setup::default() };
        let once = || attempt(&proxy.path("sibling"), &memory, setup, &content);
        walk::each(kind, |nth, errno, what| {
            calls.fail(kind.1, nth, errno);
            for _ in 0..2 {
                let outcome = once();
                assert_ne!(outcome, Outcome::Hung, "{what}");
                if calls.has_failed() {
                    break;
                }
            }
            if !calls.relent() {
                return false;
            }
            let expected = if kind.0 == "fdatasync" { Outcome::Failed } else { Outcome::Served };
            let deadline = Instant::now() + DEADLINE;
            loop {
                assert!(!device_vm.is_finished(), "{what}: the device VM has ended");
                let outcome = once();
                if outcome == expected {
                    break;
                }
                assert!(outcome == Outcome::HungUp && Instant::now() < deadline, "{what}: {outcome:?}");
            }
            // The failure of a flush is remembered, so one has to do.
            kind.0 != "fdatasync"
        });
        stop.stop();
        device_vm.join().expect("no panic").expect("served");
        proxy.process.stop();
    });
}
