//! What `vvu inspect` tells of the device of a proxy.

use std::os::unix::net::UnixStream;

use vvu::driver::inspect;
use vvu::vfio_user::client::VfioUserDevice;

use crate::chain::Proxy;

#[test]
fn the_registers_of_a_device_are_told() {
    let proxy = Proxy::start(8 << 20, 16);
    let stream = UnixStream::connect(proxy.vfio_user()).expect("proxy");
    let device = VfioUserDevice::from_stream(stream).expect("vfio-user");
    let want = "\
device status: 0x00, reset
features offered: 0x320000000, event index, version 1, access through the IOMMU
virtqueue 0: 256 descriptors, off
virtqueue 1: 256 descriptors, off
link: 0x0, no back-end, no front-end
vhost queues: at most 16
uuid: 07070707-0707-0707-0707-070707070707
shared memory BAR: 0x4000000 bytes
";
    assert_eq!(inspect::registers(&device).expect("told"), want);
    drop(device);
    proxy.end();
}
