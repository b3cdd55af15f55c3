//! Notifications by a back-end in the driver's process that stores to the doorbell register of the express device.

use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;

use vhost::VhostBackend;

use vvu::backend::block::{BlockBackend, BlockOptions};
use vvu::driver::Driver as GuestDriver;
use vvu::vfio_user::client::VfioUserDevice;
use vvu::{StopToken, serve};

use crate::chain::{FLAT, Proxy};
use crate::common::{DEADLINE, Driver, Setup, SiblingMemory, Task, Vmm, disk, pattern, wait_until};

/// A sibling's driver, and the back-end with the express device's register.
struct Direct {
    proxy: Proxy,
    vmm: Vmm,
    memory: Arc<SiblingMemory>,
    stop: StopToken,
    program: Task<()>,
}

impl Direct {
    fn start(content: &[u8]) -> Self {
        let (directory, path) = disk(content).expect("disk");
        let proxy = Proxy::start(FLAT[0].size as u64, 16);
        let mut vmm = proxy.express();
        vmm.map_register();
        let express = vmm.device();
        let stream = UnixStream::connect(proxy.vfio_user()).expect("proxy");
        let stop = StopToken::new().expect("token");
        let token = stop.clone();
        let (sender, ready) = channel();
        let program = Task::spawn("program", move || {
            let device = VfioUserDevice::from_stream(stream).expect("vfio-user");
            let mut driver = GuestDriver::new(device).expect("vvu device");
            driver.use_express(express).expect("express device");
            let block = BlockBackend::open(&BlockOptions::new(path)).expect("disk");
            let block = block.with_doorbells(driver.direct_doorbells());
            let serve_one = |frontend| {
                block.serve_frontend(frontend, &token);
                Ok::<_, Infallible>(())
            };
            serve(driver, &token, || sender.send(()).expect("test"), serve_one).expect("clean end");
            drop(directory);
        });
        ready.recv_timeout(DEADLINE).expect("the program is ready");
        let memory = Arc::new(proxy.memory(&FLAT));
        Self { proxy, vmm, memory, stop, program }
    }

    /// As [`start`](Self::start), with a front-end whose call eventfd the VMM knows already.
    fn connected(content: &[u8]) -> (Self, Driver) {
        let direct = Self::start(content);
        let mut driver = direct.connect();
        direct.read_until_stored(&mut driver, content);
        (direct, driver)
    }

    fn connect(&self) -> Driver {
        Driver::connect_persistently(&self.proxy.vhost_user(), &self.memory, Setup::default())
    }

    /// Reads until a notification was a store.
    fn read_until_stored(&self, driver: &mut Driver, content: &[u8]) {
        let data = Driver::buffers(&self.memory, 4);
        let goal = self.vmm.stored() + 1;
        wait_until("notifications are stores", || {
            assert_eq!(driver.read(0, 0, data, 4096), content);
            (self.vmm.stored() >= goal).then_some(())
        });
    }

    fn end(self) {
        self.stop.stop();
        self.program.join();
        drop(self.vmm);
        self.proxy.end();
    }
}

#[test]
fn notifications_are_stores_once_the_vmm_knows_the_call_eventfd() {
    let content = pattern(1, 4096);
    let (direct, mut driver) = Direct::connected(&content);
    let (stored, rung) = (direct.vmm.stored(), direct.vmm.rung());
    let data = Driver::buffers(&direct.memory, 4);
    for _ in 0..100 {
        assert_eq!(driver.read(0, 0, data, 4096), content);
    }
    assert!(direct.vmm.stored() > stored);
    assert_eq!(direct.vmm.rung(), rung, "no notification takes an eventfd");
    direct.end();
}

#[test]
fn new_call_eventfds_lose_no_notification() {
    let content = pattern(2, 4096);
    let (direct, mut driver) = Direct::connected(&content);
    let data = Driver::buffers(&direct.memory, 4);
    for round in 0..300 {
        driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
        assert_eq!(driver.read(0, 0, data, 4096), content, "round {round}");
    }
    direct.read_until_stored(&mut driver, &content);
    direct.end();
}

#[test]
fn a_vmm_that_hangs_up_costs_speed_alone() {
    let content = pattern(3, 4096);
    let (direct, mut driver) = Direct::connected(&content);
    direct.vmm.hang_up();
    let data = Driver::buffers(&direct.memory, 4);
    for _ in 0..20 {
        assert_eq!(driver.read(0, 0, data, 4096), content);
        driver.rings[0].renew_call();
        driver.frontend.set_vring_call(0, &driver.rings[0].call).expect("call");
    }
    wait_until("the driver has left the express device", || (direct.vmm.bound() == 0).then_some(()));
    let stored = direct.vmm.stored();
    assert_eq!(driver.read(0, 0, data, 4096), content);
    assert_eq!(direct.vmm.stored(), stored);
    direct.end();
}
