//! Writes a course down as a scenario file.

use serde_json::{Value, json};

use super::course::{Course, DEVICE_VM, Disk, Fault, Round, Sibling};

/// The measurement that counts verified blocks.
pub(super) const VERIFIED: &str = "blocks_verified";
/// RAM of the device VM in MiB: room for four disks, which are unpacked into it, and for back-ends.
const DEVICE_MIB: u64 = 256;
/// RAM of a sibling in MiB.
const SIBLING_MIB: u64 = 128;
/// Size of a disk in MiB.
const DISK_MIB: u64 = 8;
/// Milliseconds between the attempts of a front-end to reconnect.
const RECONNECT_MS: u32 = 50;
/// Seconds of a load, and those that each fault adds.
const LOAD_SECONDS: (usize, usize) = (2, 2);
/// Seconds, at native speed, that a load may take beyond its own. It ends late when the last fault stalls it.
const LOAD_LIMIT: usize = 60;
/// Seconds, at native speed, until a sibling has its disks.
const DISKS_LIMIT: u64 = 60;

impl Course {
    /// The name of the scenario.
    pub(super) fn name(&self) -> String {
        format!("soak-{}", self.seed)
    }

    /// The text of the scenario file.
    pub(super) fn to_text(&self) -> String {
        let name = |name: char| name.to_string();
        let mut vms = vec![(DEVICE_VM.to_owned(), json!({ "memory_mib": DEVICE_MIB }))];
        vms.extend(self.siblings.iter().map(|sibling| {
            (sibling.name.clone(), json!({ "memory_mib": SIBLING_MIB, "cpus": sibling.cpus }))
        }));
        let vvu = self.siblings.iter().flat_map(|sibling| {
            sibling.disks.iter().map(move |disk| {
                let device = json!({
                    "sibling_vm": sibling.name, "addr": "auto", "reconnect_ms": RECONNECT_MS,
                    "express": disk.express, "supervised": disk.supervised,
                    "frontend": { "block": { "queues": disk.queues } },
                });
                (name(disk.name), device)
            })
        });
        let disks = self.disks().map(|disk| {
            (format!("disk-{}", disk.name), json!({ "size_mib": DISK_MIB, "seed": u32::from(disk.name) }))
        });
        let mut steps = Steps { check: "boot".to_owned(), ..Steps::default() };
        // A sibling waits for its back-ends before it boots, unless they are ready.
        steps.add("start", json!({ "vm": DEVICE_VM }));
        self.siblings.iter().for_each(|sibling| steps.add("start", json!({ "vm": sibling.name })));
        steps.start_backends(self);
        self.siblings.iter().for_each(|sibling| steps.wait_for_disks(sibling));
        for (index, round) in self.rounds.iter().enumerate() {
            steps.check = format!("round-{}", index + 1);
            steps.round(self, round);
        }
        steps.check = "clean-shutdown".to_owned();
        let vms_in_order = self.siblings.iter().map(|sibling| sibling.name.as_str()).chain([DEVICE_VM]);
        vms_in_order.for_each(|vm| steps.add("power_off", json!({ "vm": vm })));
        let scenario = json!({
            "name": self.name(),
            "description": format!("{} faults in {} rounds, chosen by seed {}", self.fault_count(), self.rounds.len(), self.seed),
            // It has io_uring.
            "kernel": ["devices"],
            "vms": Value::Object(vms.into_iter().collect()),
            "vvu": Value::Object(vvu.collect()),
            "disks": Value::Object(disks.collect()),
            "steps": steps.steps,
        });
        format!("{scenario:#}\n")
    }

    /// The sibling that has a disk, and the disk's name in it.
    fn place(&self, name: char) -> Option<(&Sibling, String)> {
        let letters = 'a'..='z';
        self.siblings.iter().find_map(|sibling| {
            let index = sibling.disks.iter().position(|disk| disk.name == name)?;
            Some((sibling, format!("vd{}", letters.clone().nth(index)?)))
        })
    }
}

/// The steps so far.
#[derive(Default)]
struct Steps {
    steps: Vec<Value>,
    /// The check of the next steps.
    check: String,
}

impl Steps {
    fn add(&mut self, action: &str, mut fields: Value) {
        fields["check"] = self.check.as_str().into();
        self.steps.push(json!({ action: fields }));
    }

    fn run(&mut self, vm: &str, command: impl Into<String>) {
        self.add("run", json!({ "vm": vm, "command": command.into() }));
    }

    fn start_backends(&mut self, course: &Course) {
        course.disks().for_each(|disk| self.start_backend(disk));
    }

    fn start_backend(&mut self, &Disk { name, queues, engine, .. }: &Disk) {
        self.add(
            "spawn",
            json!({
                "vm": DEVICE_VM,
                "name": format!("backend-{name}"),
                "command": format!(
                    "echo $$ > /run/{name}.pid && vvu bind {{{name}.bdf}} && \
                     exec vvu device block --vfio {{{name}.bdf}} --file {{disk-{name}}} --queues {queues} --engine {engine}"
                ),
            }),
        );
        self.add("console", json!({ "vm": DEVICE_VM, "line": format!(r"^\[backend-{name}\] .*ready") }));
    }

    fn kill_backend(&mut self, name: char, signal: &str) {
        self.add("kill", json!({ "vm": DEVICE_VM, "name": format!("backend-{name}"), "signal": signal }));
    }

    fn wait_for_disks(&mut self, sibling: &Sibling) {
        let there: Vec<_> =
            ('a'..='z').zip(&sibling.disks).map(|(c, _)| format!("test -b /dev/vd{c}")).collect();
        let command = format!("until {}; do sleep 0.1; done", there.join(" && "));
        self.add("run", json!({ "vm": sibling.name, "command": command, "timeout_s": DISKS_LIMIT }));
    }

    fn round(&mut self, course: &Course, round: &Round) {
        let seconds = LOAD_SECONDS.0 + LOAD_SECONDS.1 * round.during.len();
        let loads: Vec<_> = course
            .disks()
            .filter(|disk| round.loaded.contains(&disk.name))
            .filter_map(|disk| course.place(disk.name).map(|(sibling, block)| (disk, sibling, block)))
            .collect();
        for (Disk { name, depth, .. }, sibling, block) in &loads {
            self.add(
                "spawn",
                json!({
                    "vm": sibling.name,
                    "name": format!("load-{name}"),
                    "command": format!(
                        "exec vvu-load verify --file /dev/{block} --seconds {seconds} --depth {depth} > /tmp/load-{name}.json"
                    ),
                }),
            );
        }
        round.during.iter().for_each(|fault| self.fault(course, fault));
        for (Disk { name, .. }, sibling, _) in &loads {
            self.add(
                "wait",
                json!({ "vm": sibling.name, "name": format!("load-{name}"), "timeout_s": seconds + LOAD_LIMIT }),
            );
            self.add(
                "run",
                json!({
                    "vm": sibling.name,
                    "command": format!("cat /tmp/load-{name}.json"),
                    "expect": { "stdout": r#""blocks_verified":([1-9]\d*),"bad_blocks":0,"io_errors":0,"# },
                    "save": VERIFIED,
                    "measure": true,
                }),
            );
        }
        round.after.iter().for_each(|fault| self.fault(course, fault));
    }

    fn fault(&mut self, course: &Course, fault: &Fault) {
        match fault {
            Fault::KillBackend(name) => self.restart_backend(course, *name, "KILL", None),
            Fault::EndBackend(name) => self.restart_backend(course, *name, "TERM", None),
            Fault::FillTmp(name) => {
                self.run(DEVICE_VM, "mount -t tmpfs -o size=4k,nr_inodes=1 none /tmp");
                self.restart_backend(course, *name, "KILL", None);
                self.run(DEVICE_VM, "umount /tmp");
            }
            Fault::PauseBackend(name) => {
                let signal = |signal: &str| format!("kill -{signal} $(cat /run/{name}.pid)");
                self.run(DEVICE_VM, format!("{} && sleep 0.5 && {}", signal("STOP"), signal("CONT")));
            }
            Fault::ResetDevice(name) => {
                let reset = format!("echo 1 > /sys/bus/pci/devices/{{{name}.bdf}}/reset");
                self.restart_backend(course, *name, "KILL", Some(reset));
            }
            Fault::RebindDevice(name) => {
                let unbind = format!("echo {{{name}.bdf}} > /sys/bus/pci/drivers/vfio-pci/unbind");
                self.restart_backend(course, *name, "TERM", Some(unbind));
            }
            Fault::KillWorker(name) => self.add("kill_worker", json!({ "vvu": name })),
            Fault::UpgradeProxy(name) => self.add("upgrade_proxy", json!({ "vvu": name })),
            Fault::TakeMemory(vm) => self.run(
                vm,
                "set -- $(grep MemAvailable /proc/meminfo); \
                 dd if=/dev/zero of=/tmp/taken bs=64k count=$(($2 / 128)); rm /tmp/taken",
            ),
            Fault::CycleCpus(vm) => self.run(
                vm,
                "cd /sys/devices/system/cpu && for online in 0 1; do echo $online > cpu1/online || exit 1; done",
            ),
            Fault::RebindDriver(name) => {
                let Some((sibling, block)) = course.place(*name) else { return };
                let virtio = format!("virtio=$(basename $(readlink -f /sys/block/{block}/device))");
                let rebind = format!("echo $virtio > unbind && test ! -e /sys/block/{block} && echo $virtio > bind");
                self.run(&sibling.name, format!("{virtio} && cd /sys/bus/virtio/drivers/virtio_blk && {rebind}"));
                self.wait_for_disks(sibling);
            }
            Fault::RebootSibling(vm) => {
                self.add("reboot", json!({ "vm": vm }));
                course.siblings.iter().filter(|of| of.name == *vm).for_each(|of| self.wait_for_disks(of));
            }
            Fault::KillSibling(vm) => {
                self.add("kill_vm", json!({ "vm": vm }));
                self.add("start", json!({ "vm": vm }));
                course.siblings.iter().filter(|of| of.name == *vm).for_each(|of| self.wait_for_disks(of));
            }
            Fault::RebootDeviceVm => {
                self.add("reboot", json!({ "vm": DEVICE_VM }));
                self.start_backends(course);
            }
            Fault::KillDeviceVm => {
                self.add("kill_vm", json!({ "vm": DEVICE_VM }));
                self.add("start", json!({ "vm": DEVICE_VM }));
                self.start_backends(course);
            }
            Fault::KillAll => self.kill_all(course),
        }
    }

    /// Ends the back-end of a disk by `signal`, runs a command, and starts it again.
    fn restart_backend(&mut self, course: &Course, name: char, signal: &str, command: Option<String>) {
        self.kill_backend(name, signal);
        if let Some(command) = command {
            self.run(DEVICE_VM, command);
        }
        course.disks().filter(|disk| disk.name == name).for_each(|disk| self.start_backend(disk));
    }

    /// The order in which a person has to start everything again: proxies, the one that makes a sibling's memory first;
    /// then the device VM; then the siblings.
    fn kill_all(&mut self, course: &Course) {
        let siblings = || course.siblings.iter().map(|sibling| sibling.name.as_str());
        siblings().chain([DEVICE_VM]).for_each(|vm| self.add("kill_vm", json!({ "vm": vm })));
        for action in ["kill_proxy", "start_proxy"] {
            course.disks().for_each(|disk| self.add(action, json!({ "vvu": disk.name })));
        }
        self.add("start", json!({ "vm": DEVICE_VM }));
        self.start_backends(course);
        siblings().for_each(|vm| self.add("start", json!({ "vm": vm })));
        course.siblings.iter().for_each(|sibling| self.wait_for_disks(sibling));
    }
}
