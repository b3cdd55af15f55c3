//! Measures what the chain costs at native speed: the same requests over front-end ⇄ proxy ⇄ vfio-user client ⇄
//! guest driver and bridge ⇄ back-end, and over a plain vhost-user socket to the same back-end.
//!
//! It prints one JSON value, from which `cargo xtask bench chain` computes ratios.
#![allow(unreachable_pub, dead_code, reason = "its modules are one program, which takes parts of the tests")]

#[path = "../../tests/chain/chain.rs"]
mod chain;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/chain/logs.rs"]
mod logs;

mod echo;
mod latencies;
mod links;
mod tests;
mod wake_ups;

use std::time::Duration;

use clap::Parser;
use serde_json::{Map, Value, json};

use links::Via;
use tests::{Limit, Test, Way};

/// Measures the chain and the plain socket in turns.
#[derive(Debug, Parser)]
struct Options {
    /// Rounds; each measures everything once over fresh connections
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u32,
    /// Begin with the chain instead of the plain socket
    #[arg(long)]
    vvu_first: bool,
    /// How long each test takes
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    seconds: f64,
    /// Compare the engines of the block back-end, with and without direct I/O, over the plain socket
    #[arg(long, conflicts_with = "test")]
    engines: bool,
    /// Carry out one test alone, over the link that --via names
    #[arg(long, value_name = "TEST", requires = "via")]
    test: Option<Test>,
    #[arg(long, value_name = "LINK", requires = "operations")]
    via: Option<Via>,
    /// How many operations a test that is alone carries out
    #[arg(long, value_name = "N")]
    operations: Option<u64>,
    /// Poll window of the block back-end in microseconds
    #[arg(long, value_name = "N", default_value_t = 200)]
    poll_us: u64,
    /// Set by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    // Wake-ups are counted by the name of the thread.
    let front_end = std::thread::Builder::new().name("front-end".to_owned()).spawn(move || measure(&options));
    front_end.expect("a thread").join().expect("a measurement");
}

fn measure(options: &Options) {
    let poll = Duration::from_micros(options.poll_us);
    if let (Some(test), Some(via), Some(operations)) = (options.test, options.via, options.operations) {
        println!("{}", test.run(via, Way::DEFAULT, Limit::Operations(operations), poll).into_json());
        return;
    }
    let limit = Limit::Time(Duration::try_from_secs_f64(options.seconds).expect("a number of seconds"));
    let mut results: Map<String, Value> = Map::new();
    let mut add = |test: Test, variant: &str, got: Value| {
        let of_test = results.entry(test.name()).or_insert_with(|| json!({}));
        let rounds = of_test.as_object_mut().expect("an object").entry(variant);
        rounds.or_insert_with(|| json!([])).as_array_mut().expect("an array").push(got);
    };
    for round in 0..options.rounds {
        // The variants take turns to go first.
        let reversed = (round % 2 == 0) == options.vvu_first;
        if options.engines {
            for test in [Test::ReadDepth1, Test::ReadDepth32] {
                for way in turns(Way::ALL, reversed) {
                    add(test, way.name, test.run(Via::Plain, way, limit, poll).into_json());
                }
            }
            continue;
        }
        for test in Test::ALL {
            for via in turns([Via::Plain, Via::Vvu], reversed) {
                add(test, via.name(), test.run(via, Way::DEFAULT, limit, poll).into_json());
            }
        }
    }
    println!("{}", Value::Object(results));
}

fn turns<T, const N: usize>(mut variants: [T; N], reversed: bool) -> [T; N] {
    if reversed {
        variants.reverse();
    }
    variants
}
