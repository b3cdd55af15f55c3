//! The steps in the order in which they are carried out, the rounds of repeats one after the other.

use super::scenario::Scenario;
use super::step::Step;

/// A step in its place.
#[derive(Debug, Clone)]
pub struct Placed<'a> {
    /// JSON path of the step.
    pub path: String,
    /// The check it belongs to.
    pub check: Option<&'a str>,
    /// The round of the repeat that it is in, from 1.
    pub round: Option<u32>,
    /// The step, which is no repeat.
    pub step: &'a Step,
}

impl<'a> Placed<'a> {
    /// `step` itself, or at most `rounds` rounds of it if it is a repeat.
    fn unroll(step: &'a Step, path: String, rounds: u32) -> Vec<Self> {
        let outer = step.check();
        let Step::Repeat(repeat) = step else {
            return vec![Self { path, check: outer, round: None, step }];
        };
        let round = |round: u32| {
            let path = &path;
            repeat.steps.iter().enumerate().map(move |(index, step)| Self {
                path: format!("{path}.repeat.steps[{index}]"),
                check: step.check().or(outer),
                round: Some(round),
                step,
            })
        };
        (1..=repeat.times.min(rounds)).flat_map(round).collect()
    }

    /// The place for a message: the JSON path, and the round if there are several.
    #[must_use]
    pub fn place(&self) -> String {
        match self.round {
            Some(round) => format!("{}, round {round}", self.path),
            None => self.path.clone(),
        }
    }
}

impl Scenario {
    /// The steps one after the other, with at most `rounds` rounds of each repeat.
    #[must_use]
    pub fn unrolled(&self, rounds: u32) -> Vec<Placed<'_>> {
        let placed = |(index, step)| Placed::unroll(step, format!("steps[{index}]"), rounds);
        self.steps.iter().enumerate().flat_map(placed).collect()
    }

    /// Returns true if a step starts the VM `vm`. A VM that no step starts runs from the beginning.
    #[must_use]
    pub fn starts(&self, vm: &str) -> bool {
        self.unrolled(1).iter().any(|placed| matches!(placed.step, Step::Start(start) if start.vm == vm))
    }

    /// Returns true if a step attaches the vvu device `vvu` to its sibling VM. One that no step attaches is there from
    /// the VM's start.
    #[must_use]
    pub fn attaches(&self, vvu: &str) -> bool {
        self.unrolled(1).iter().any(|placed| matches!(placed.step, Step::Attach(attach) if attach.vvu == vvu))
    }

    /// Returns true if a step sends requests to the VMM of `vm` while the VM runs.
    #[must_use]
    pub fn manages(&self, vm: &str) -> bool {
        self.unrolled(1).iter().any(|placed| matches!(placed.step, Step::Qmp(qmp) if qmp.vm == vm))
            || self.vvu_of_sibling(vm).any(|(vvu, _)| self.attaches(vvu))
    }

    /// Returns true if a step reboots the VM `vm`.
    #[must_use]
    pub fn reboots(&self, vm: &str) -> bool {
        self.unrolled(1).iter().any(|placed| matches!(placed.step, Step::Reboot(reboot) if reboot.vm == vm))
    }
}
