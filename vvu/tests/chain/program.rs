//! A back-end in the process of its bridge, as `vvu device block --vfio` runs it.

use std::convert::Infallible;
use std::fmt::{Debug, Display};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use vvu::backend::block::{BlockBackend, BlockOptions};
use vvu::driver::Driver as GuestDriver;
use vvu::vfio_user::client::VfioUserDevice;
use vvu::{ServeError, StopToken, serve, serve_socket};

use crate::chain::{FLAT, Proxy};
use crate::common::{DEADLINE, Driver, Setup, Task, disk, pattern};

/// A program that serves a device with a back-end of its own.
pub struct Program<E: Debug + Display> {
    /// Cutting it takes the device away.
    pub connection: UnixStream,
    stop: StopToken,
    task: Task<Result<(), ServeError<E>>>,
}

impl<E: Debug + Display + Send + 'static> Program<E> {
    /// Starts a program whose `backend` serves the socket of the path it gets, until the stop is requested. Returns once
    /// a front-end can connect.
    pub fn start(
        proxy: &Proxy,
        backend: impl FnOnce(&Path, &StopToken) -> Result<(), E> + Send + 'static,
    ) -> Self {
        Self::run(proxy, move |driver, stop, ready| {
            serve_socket(driver, stop, ready, |path| backend(path, stop))
        })
    }

    /// As [`start`](Self::start), with a `backend` that serves one connected stream after another.
    fn start_with_streams(
        proxy: &Proxy,
        mut backend: impl FnMut(UnixStream, &StopToken) -> Result<(), E> + Send + 'static,
    ) -> Self {
        Self::run(proxy, move |driver, stop, ready| {
            serve(driver, stop, ready, |stream| backend(stream, stop))
        })
    }

    fn run(
        proxy: &Proxy,
        serve: impl FnOnce(GuestDriver<VfioUserDevice>, &StopToken, &dyn Fn()) -> Result<(), ServeError<E>>
        + Send
        + 'static,
    ) -> Self {
        let stream = UnixStream::connect(proxy.vfio_user()).expect("proxy");
        let connection = stream.try_clone().expect("descriptor");
        let stop = StopToken::new().expect("token");
        let token = stop.clone();
        let (sender, ready) = channel();
        let task = Task::spawn("program", move || {
            let driver = GuestDriver::new(VfioUserDevice::from_stream(stream).expect("vfio-user"));
            serve(driver.expect("vvu device"), &token, &|| sender.send(()).expect("test"))
        });
        if let Err(error) = ready.recv_timeout(DEADLINE) {
            panic!("waiting for the program to be ready: {error}");
        }
        Self { connection, stop, task }
    }

    /// What the program came to by itself.
    pub fn outcome(self) -> Result<(), ServeError<E>> {
        self.task.join()
    }

    /// Asks the program to end, and waits until it has.
    pub fn end(self) {
        let Self { connection: _connection, stop, task } = self;
        stop.stop();
        task.join().expect("clean end");
    }
}

/// A message of a front-end.
fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("small");
    [&[request, 1, size].map(u32::to_le_bytes).concat(), payload].concat()
}

/// Front-ends that make the back-end hang up, or the device or the bridge turn them away, are followed by one that
/// is served.
#[test]
fn hostile_front_ends_do_not_end_the_program() {
    let content = pattern(20, 4096);
    let (_directory, path) = disk(&content).expect("disk");
    let block = BlockBackend::open(&BlockOptions { queues: 4, ..BlockOptions::new(path) }).expect("disk");
    let proxy = Proxy::start(8 << 20, 16);
    let memory = Arc::new(proxy.memory(&FLAT));
    let data = Driver::buffers(&memory, 4);
    let program = Program::start_with_streams(&proxy, move |stream, stop| {
        block.serve_frontend(stream, stop);
        Ok::<_, Infallible>(())
    });

    let vring = |index: u32, value: u32| [index, value].map(u32::to_le_bytes).concat();
    let rings = [0; 40];
    let configuration = [&[0, 4096, 0].map(u32::to_le_bytes).concat()[..], &[0; 4084]].concat();
    for (sort, bytes, hangs_up) in [
        ("features that were not offered", message(2, &[0xff; 8]), true),
        ("a queue that does not exist", message(8, &vring(99, 128)), true),
        ("a queue of no descriptors", message(8, &vring(0, 0)), true),
        ("rings outside of memory", message(9, &rings), true),
        ("the position of a queue that does not exist", message(11, &vring(77, 0)), true),
        ("a payload that is too short", message(8, &[1, 2, 3]), true),
        ("a request that nobody knows", message(0xffff, &[0; 8]), true),
        ("an answer to no question", [0x7, 0x5, 0x0].map(u32::to_le_bytes).concat(), false),
        ("the configuration before it is agreed", message(24, &configuration), false),
        ("half a message", message(2, &[0; 8])[..15].to_vec(), false),
    ] {
        let mut stream = UnixStream::connect(proxy.vhost_user()).expect("proxy");
        stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
        stream.write_all(&bytes).expect("message");
        if hangs_up {
            let got = stream.read(&mut [0]);
            assert!(matches!(got, Ok(0)), "{sort}: want the end of the connection, got {got:?}");
        }
        drop(stream);
        let mut driver = Driver::connect_persistently(&proxy.vhost_user(), &memory, Setup::default());
        assert_eq!(driver.read(0, 0, data, 4096), content, "after {sort}");
    }
    program.end();
    proxy.end();
}
