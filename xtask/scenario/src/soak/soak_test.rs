use std::collections::BTreeSet;
use std::path::Path;

use proptest::prelude::*;

use super::course::{Course, Fault, MOST_DISKS};
use super::minimise::minimise;
use crate::format::{Scenario, Step};

/// What every course promises, also one in which parts are missing.
fn check(course: &Course) {
    let scenario = Scenario::parse(&course.to_text(), Path::new(".")).expect("a valid scenario");
    assert_eq!(scenario.vvu.len(), course.disks().count());
    assert!((1..=MOST_DISKS).contains(&course.disks().count()));
    assert!(course.siblings.iter().all(|sibling| !sibling.disks.is_empty()));
    for round in &course.rounds {
        assert!(!round.loaded.is_empty(), "nothing is verified");
        for fault in &round.during {
            assert!(course.spares(fault, &round.loaded), "{fault:?} makes a load fail");
        }
    }
    let loads = scenario.steps.iter().filter(|step| matches!(step, Step::Wait(_))).count();
    assert_eq!(loads, course.rounds.iter().map(|round| round.loaded.len()).sum::<usize>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn a_seed_gives_one_valid_scenario(seed: u64) {
        let course = Course::random(seed);
        check(&course);
        prop_assert_eq!(course.to_text(), Course::random(seed).to_text());
    }

    #[test]
    fn what_is_left_after_a_part_was_dropped_is_valid_and_smaller(seed: u64, picks: [usize; 6]) {
        let size = |course: &Course| course.to_text().len();
        let mut course = Course::random(seed);
        for pick in picks {
            let mut smaller = course.smaller();
            if smaller.is_empty() {
                break;
            }
            let next = smaller.swap_remove(pick % smaller.len());
            check(&next);
            prop_assert!(size(&next) < size(&course));
            course = next;
        }
    }
}

#[test]
fn seeds_reach_every_fault_and_every_number_of_siblings_and_disks() {
    let (mut faults, mut shapes) = (BTreeSet::new(), BTreeSet::new());
    for course in (0..500).map(Course::random) {
        shapes.insert((course.siblings.len(), course.disks().count()));
        for fault in course.rounds.iter().flat_map(|round| round.during.iter().chain(&round.after)) {
            let text = format!("{fault:?}");
            faults.insert(text.split('(').next().unwrap_or_default().to_owned());
        }
    }
    assert_eq!(faults.len(), 16, "{faults:?}");
    assert_eq!(shapes.len(), 10, "{shapes:?}");
}

#[test]
fn a_course_that_fails_loses_all_that_does_not_matter() {
    let paused = |fault: &Fault| matches!(fault, Fault::PauseBackend('b'));
    let taken = |fault: &Fault| matches!(fault, Fault::TakeMemory(vm) if vm == "device");
    let fails = |course: &Course| {
        let both = |faults: &[Fault]| faults.iter().any(paused) && faults.iter().any(taken);
        course.rounds.iter().any(|round| both(&round.during))
    };
    let course = (0..).map(Course::random).find(|course| fails(course) && course.siblings.len() > 2);
    let course = course.expect("some seed");
    let mut runs = 0;
    let minimal = minimise(course.clone(), |course| {
        runs += 1;
        Ok(Some(fails(course)))
    });
    let minimal = minimal.expect("no run failed to run");
    assert!(fails(&minimal));
    assert_eq!((minimal.fault_count(), minimal.disks().count()), (2, 1), "{minimal:?}");
    assert!(runs < 500, "{runs} runs");
    let first = minimise(course.clone(), |_| Ok(None)).expect("no run");
    assert_eq!(first, course, "no time");
}
