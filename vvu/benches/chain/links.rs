//! The two ways from a front-end to a back-end: directly, and through a vvu device.

use std::path::Path;
use std::sync::Arc;

use vvu::bridge::Retry;

use crate::chain::{FLAT, Guest, Proxy};
use crate::common::{Driver, Setup, SiblingMemory};

/// A way from a front-end to a back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Via {
    /// The back-end's own socket.
    Plain,
    /// The whole chain.
    Vvu,
}

impl Via {
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Vvu => "vvu",
        }
    }
}

/// A connected front-end.
pub struct Link {
    pub driver: Driver,
    chain: Option<(Proxy, Guest)>,
}

impl Link {
    /// Connects to the back-end that listens on `socket`.
    pub fn new(via: Via, socket: &Path, setup: Setup) -> Self {
        let connect = |socket: &Path, memory: SiblingMemory| {
            Driver::connect(socket, &Arc::new(memory), setup).expect("connection")
        };
        match via {
            Via::Plain => {
                let memory = SiblingMemory::new(FLAT[0].size as u64, &FLAT);
                Self { driver: connect(socket, memory), chain: None }
            }
            Via::Vvu => {
                let proxy = Proxy::start(FLAT[0].size as u64, 16);
                let guest = Guest::start(&proxy, socket, Retry::Forever);
                let driver = connect(&proxy.vhost_user(), proxy.memory(&FLAT));
                Self { driver, chain: Some((proxy, guest)) }
            }
        }
    }

    pub fn end(self) {
        drop(self.driver);
        if let Some((proxy, guest)) = self.chain {
            guest.end();
            proxy.end();
        }
    }
}
