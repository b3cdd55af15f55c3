//! Walks over the calls of a kind and their errors.

use crate::calls::{HARMLESS, KINDS, Kind};

/// Most calls of one kind that are tried.
const CALLS_MAX: u32 = 4000;

/// Whether to try every call and every error.
fn is_thorough() -> bool {
    std::env::var_os("VVU_FAULTS").is_some_and(|value| value == "all")
}

/// Calls `attempt` with the number of a call, an error, and a text that names both. It returns whether the call was made;
/// the first one that is not made ends the walk.
pub fn each((name, _, errors): &Kind, mut attempt: impl FnMut(u32, i32, &str) -> bool) {
    for (position, errno) in errors.iter().enumerate() {
        let mut nth = 1;
        loop {
            let error = std::io::Error::from_raw_os_error(*errno);
            if !attempt(nth, *errno, &format!("call {nth} of {name} fails: {error}")) {
                break;
            }
            nth += if is_thorough() { 1 } else { 1 + nth / 4 * (1 + u32::try_from(position).expect("few")) };
            assert!(
                nth < CALLS_MAX,
                "more than {CALLS_MAX} calls of {name}: is there a loop that never ends?"
            );
        }
    }
}

/// Runs `test` for each kind, one after the other: a process that is started inherits what another start has open at that
/// moment, and with it would keep an interceptor alive.
pub fn each_kind(kinds: &[Kind], test: impl Fn(&Kind)) {
    let only = std::env::var("VVU_FAULTS_KIND").ok();
    kinds.iter().filter(|kind| only.as_deref().is_none_or(|only| only == kind.0)).for_each(test);
}

/// Fails the test if a number is that of a call of which nothing is said.
pub fn assert_known(numbers: &[i64]) {
    let known = |number: &i64| KINDS.iter().any(|kind| kind.1 == *number) || HARMLESS.contains(number);
    let unknown: Vec<_> = numbers.iter().filter(|number| !known(number)).collect();
    assert!(unknown.is_empty(), "system calls {unknown:?}: add them to KINDS, or to HARMLESS");
}
