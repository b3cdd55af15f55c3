//! What a soak run does, chosen at random from a seed: the topology, and the faults of each round.

use std::collections::BTreeSet;

use fastrand::Rng;

/// The VM that serves all disks.
pub(super) const DEVICE_VM: &str = "device";
/// Most siblings, and most disks of all siblings.
pub(super) const MOST_DISKS: usize = 4;
/// Most rounds of a course.
const MOST_ROUNDS: usize = 4;
/// Most faults while a round's loads run, and most after they have ended.
const MOST_FAULTS: (usize, usize) = (8, 2);

/// One random run: siblings with disks that one device VM serves, and rounds of load and faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Course {
    pub(super) seed: u64,
    pub(super) siblings: Vec<Sibling>,
    pub(super) rounds: Vec<Round>,
}

/// A sibling VM. It has at least one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sibling {
    pub(super) name: String,
    pub(super) cpus: u32,
    pub(super) disks: Vec<Disk>,
}

/// A disk, which is a vvu device with a proxy and a back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// A letter; it names the vvu device.
    pub(super) name: char,
    pub(super) queues: u16,
    /// The `--engine` of its back-end.
    pub(super) engine: &'static str,
    /// Requests that the load keeps in flight.
    pub(super) depth: u32,
    pub(super) express: bool,
    pub(super) supervised: bool,
}

/// Loads that write and verify, faults while they run, and faults after they have ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Round {
    /// The disks with a load; at least one.
    pub(super) loaded: BTreeSet<char>,
    pub(super) during: Vec<Fault>,
    pub(super) after: Vec<Fault>,
}

/// A fault, after which everything works again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL to the back-end of a disk, which is started again.
    KillBackend(char),
    /// SIGTERM to it.
    EndBackend(char),
    /// SIGKILL to it, and it starts again while `/tmp` is full.
    FillTmp(char),
    /// The back-end is stopped for a while.
    PauseBackend(char),
    /// The back-end is killed, and its vvu device reset before it starts again.
    ResetDevice(char),
    /// The back-end ends, and its vvu device is unbound from its driver and bound again.
    RebindDevice(char),
    /// SIGKILL to the worker of the disk's supervised proxy.
    KillWorker(char),
    /// The disk's supervised proxy runs its program anew.
    UpgradeProxy(char),
    /// Half of the free memory of a VM is taken for a moment.
    TakeMemory(String),
    /// All CPUs of a sibling but the first go and come back.
    CycleCpus(String),
    /// The sibling's block driver lets go of a disk and takes it again.
    RebindDriver(char),
    /// A sibling reboots.
    RebootSibling(String),
    /// SIGKILL to the VMM of a sibling, which is started again.
    KillSibling(String),
    /// The device VM reboots, which restores its disk images.
    RebootDeviceVm,
    /// SIGKILL to the VMM of the device VM, which is started again.
    KillDeviceVm,
    /// SIGKILL to all VMMs and proxies, which are started again.
    KillAll,
}

/// The loads that a fault makes fail, so that none of them may run meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disturbs<'a> {
    Nothing,
    Disk(char),
    Sibling(&'a str),
    All,
}

impl Fault {
    /// The loads that must have ended before.
    pub(super) fn disturbs(&self) -> Disturbs<'_> {
        match self {
            Self::KillBackend(_)
            | Self::EndBackend(_)
            | Self::FillTmp(_)
            | Self::PauseBackend(_)
            | Self::ResetDevice(_)
            | Self::RebindDevice(_)
            | Self::KillWorker(_)
            | Self::UpgradeProxy(_)
            | Self::TakeMemory(_)
            | Self::CycleCpus(_) => Disturbs::Nothing,
            Self::RebindDriver(disk) => Disturbs::Disk(*disk),
            Self::RebootSibling(name) | Self::KillSibling(name) => Disturbs::Sibling(name),
            Self::RebootDeviceVm | Self::KillDeviceVm | Self::KillAll => Disturbs::All,
        }
    }

    /// The disk that the fault is about.
    fn disk(&self) -> Option<char> {
        match self {
            Self::KillBackend(disk)
            | Self::EndBackend(disk)
            | Self::FillTmp(disk)
            | Self::PauseBackend(disk)
            | Self::ResetDevice(disk)
            | Self::RebindDevice(disk)
            | Self::KillWorker(disk)
            | Self::UpgradeProxy(disk)
            | Self::RebindDriver(disk) => Some(*disk),
            _ => None,
        }
    }

    /// The sibling VM that the fault is about.
    fn sibling(&self) -> Option<&str> {
        match self {
            Self::TakeMemory(vm) | Self::CycleCpus(vm) | Self::RebootSibling(vm) | Self::KillSibling(vm) => {
                Some(vm)
            }
            _ => None,
        }
    }
}

impl Course {
    /// The course of a seed, always the same.
    pub(super) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut names = ('a'..='z').take(rng.usize(1..=MOST_DISKS));
        let count = rng.usize(1..=names.clone().count());
        let mut siblings: Vec<_> = (1..=count)
            .map(|number| Sibling {
                name: format!("sibling-{number}"),
                cpus: rng.u32(1..=2),
                disks: Vec::new(),
            })
            .collect();
        // Each has one, and the others come to anyone. The names stay in the order of the siblings.
        let mut counts = vec![1; count];
        (count..names.clone().count()).for_each(|_| counts[rng.usize(..count)] += 1);
        for (sibling, count) in siblings.iter_mut().zip(counts) {
            sibling.disks = names.by_ref().take(count).map(|name| Disk::random(name, &mut rng)).collect();
        }
        let mut course = Self { seed, siblings, rounds: Vec::new() };
        let faults = course.possible();
        let rounds = (0..rng.usize(1..=MOST_ROUNDS)).map(|_| course.round(&faults, &mut rng)).collect();
        course.rounds = rounds;
        course
    }

    fn round(&self, faults: &[Fault], rng: &mut Rng) -> Round {
        let disks: Vec<char> = self.disks().map(|disk| disk.name).collect();
        let mut loaded: BTreeSet<_> = disks.iter().copied().filter(|_| rng.u32(..4) > 0).collect();
        if loaded.is_empty() {
            loaded.extend(rng.choice(&disks));
        }
        let quiet: Vec<_> = faults.iter().filter(|fault| self.spares(fault, &loaded)).cloned().collect();
        let mut some = |of: &[Fault], least, most| {
            let picks = (0..rng.usize(least..=most)).filter_map(|_| rng.choice(of).cloned());
            picks.collect::<Vec<_>>()
        };
        let (during, after) = (some(&quiet, 1, MOST_FAULTS.0), some(faults, 0, MOST_FAULTS.1));
        Round { loaded, during, after }
    }

    /// Whether the fault leaves the loads of these disks alone.
    pub(super) fn spares(&self, fault: &Fault, loaded: &BTreeSet<char>) -> bool {
        match fault.disturbs() {
            Disturbs::Nothing => true,
            Disturbs::Disk(disk) => !loaded.contains(&disk),
            Disturbs::Sibling(name) => {
                let siblings = self.siblings.iter().filter(|sibling| sibling.name == name);
                siblings.flat_map(|sibling| &sibling.disks).all(|disk| !loaded.contains(&disk.name))
            }
            Disturbs::All => loaded.is_empty(),
        }
    }

    /// Every fault that this topology can have.
    fn possible(&self) -> Vec<Fault> {
        let mut faults = vec![
            Fault::TakeMemory(DEVICE_VM.to_owned()),
            Fault::RebootDeviceVm,
            Fault::KillDeviceVm,
            Fault::KillAll,
        ];
        for sibling in &self.siblings {
            let of_sibling = [Fault::TakeMemory, Fault::RebootSibling, Fault::KillSibling];
            faults.extend(of_sibling.map(|fault| fault(sibling.name.clone())));
            if sibling.cpus > 1 {
                faults.push(Fault::CycleCpus(sibling.name.clone()));
            }
        }
        for disk in self.disks() {
            let of_disk = [
                Fault::KillBackend,
                Fault::EndBackend,
                Fault::FillTmp,
                Fault::PauseBackend,
                Fault::ResetDevice,
                Fault::RebindDevice,
                Fault::RebindDriver,
            ];
            faults.extend(of_disk.map(|fault| fault(disk.name)));
            if disk.supervised {
                faults.extend([Fault::KillWorker(disk.name), Fault::UpgradeProxy(disk.name)]);
            }
        }
        faults
    }

    /// The disks of all siblings.
    pub(super) fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.siblings.iter().flat_map(|sibling| &sibling.disks)
    }

    /// Number of faults.
    pub(super) fn fault_count(&self) -> usize {
        self.rounds.iter().map(|round| round.during.len() + round.after.len()).sum()
    }

    /// The courses in which one part of this one is missing, large parts first: a round, a sibling, a disk, a fault, a
    /// load.
    pub(super) fn smaller(&self) -> Vec<Self> {
        let mut courses = Vec::new();
        if self.rounds.len() > 1 {
            courses.extend((0..self.rounds.len()).map(|index| {
                let mut course = self.clone();
                course.rounds.remove(index);
                course
            }));
        }
        courses.extend(self.siblings.iter().filter_map(|sibling| {
            let disks: Vec<_> = sibling.disks.iter().map(|disk| disk.name).collect();
            self.without(&disks)
        }));
        courses.extend(self.disks().filter_map(|disk| self.without(&[disk.name])));
        for (index, round) in self.rounds.iter().enumerate() {
            let edit = |edit: &dyn Fn(&mut Round)| {
                let mut course = self.clone();
                edit(&mut course.rounds[index]);
                course
            };
            courses.extend((0..round.during.len()).map(|at| edit(&|round| drop(round.during.remove(at)))));
            courses.extend((0..round.after.len()).map(|at| edit(&|round| drop(round.after.remove(at)))));
            if round.loaded.len() > 1 {
                courses.extend(round.loaded.iter().map(|disk| {
                    edit(&|round| {
                        round.loaded.remove(disk);
                    })
                }));
            }
        }
        courses
    }

    /// The course without these disks, the siblings that have no others, and their faults; `None` if nothing is left.
    fn without(&self, disks: &[char]) -> Option<Self> {
        let mut course = self.clone();
        for sibling in &mut course.siblings {
            sibling.disks.retain(|disk| !disks.contains(&disk.name));
        }
        let gone: Vec<_> = course.siblings.extract_if(.., |sibling| sibling.disks.is_empty()).collect();
        let has_gone = |fault: &Fault| {
            fault.disk().is_some_and(|disk| disks.contains(&disk))
                || fault.sibling().is_some_and(|name| gone.iter().any(|sibling| sibling.name == name))
        };
        for round in &mut course.rounds {
            round.loaded.retain(|disk| !disks.contains(disk));
            round.during.retain(|fault| !has_gone(fault));
            round.after.retain(|fault| !has_gone(fault));
        }
        course.rounds.retain(|round| !round.loaded.is_empty());
        (!course.siblings.is_empty() && !course.rounds.is_empty()).then_some(course)
    }
}

impl Disk {
    fn random(name: char, rng: &mut Rng) -> Self {
        Self {
            name,
            queues: rng.u16(1..=2),
            engine: if rng.bool() { "io-uring" } else { "sync" },
            depth: rng.u32(1..=16),
            express: rng.bool(),
            supervised: rng.bool(),
        }
    }
}
