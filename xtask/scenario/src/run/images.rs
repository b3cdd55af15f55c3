//! The images of a scenario's VMs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use vvu_artifacts::image::{DiskImage, OverlayEntry, Pattern as Content, with_overlay};
use vvu_process::progress::Progress;
use vvu_testvm::Lab;

use super::plan::Plan;
use crate::format::{DiskFacts, DiskSpec, Pattern, Scenario};

/// The initramfs of each VM and facts about the disks in it.
pub(super) struct Images {
    /// Initramfs by VM.
    pub(super) files: BTreeMap<String, PathBuf>,
    /// Facts by disk.
    pub(super) disks: BTreeMap<String, DiskFacts>,
}

impl Images {
    /// Makes the initramfs of every VM of `plan`, with the trees in `overlay` laid over each.
    ///
    /// # Errors
    ///
    /// Fails if a disk cannot be read or the run directory cannot be written.
    pub(super) fn build(
        scenario: &Scenario,
        plan: &Plan,
        lab: &Lab<'_>,
        overlay: &[PathBuf],
        progress: &Progress,
    ) -> Result<Self> {
        let (setup, run) = (lab.setup(), lab.run());
        let stage = progress.stage("image");
        let mut images = Self { files: BTreeMap::new(), disks: BTreeMap::new() };
        let mut bytes = 0;
        for (name, vm) in &scenario.vms {
            let programs = vm.programs.iter().filter_map(|program| setup.programs.get(program));
            let trees = programs.chain(overlay).chain(&vm.overlay);
            let mut entries: Vec<_> = trees.map(|tree| OverlayEntry::Tree(tree.clone())).collect();
            let config = plan.vms.get(name).context("every VM is planned")?;
            entries.extend(setup.kernel_modules(&scenario.kernel_of(vm), config)?);
            let mut disks = Vec::new();
            for (disk, spec) in scenario.disks.iter().filter(|(_, spec)| spec.vm == *name) {
                let image = disk_image(spec)?;
                disks.push((disk, image.size));
                entries.push(OverlayEntry::Disk { path: format!("/{disk}.img"), image });
            }
            if entries.is_empty() {
                images.files.insert(name.clone(), setup.base.path.clone());
                continue;
            }
            stage.update(format!("initramfs of {name}"));
            let file = run.file(&format!("{name}.cpio"));
            let written = with_overlay(&setup.base, &entries, &file)?;
            bytes += written.bytes;
            for (disk, size) in disks {
                let sha256 =
                    written.disks.get(&format!("/{disk}.img")).context("a disk has no digest")?.clone();
                images.disks.insert(disk.clone(), DiskFacts { sha256, bytes: size });
            }
            images.files.insert(name.clone(), file);
        }
        stage.done(format!("{} MiB base, {} MiB with disks", setup.base.bytes >> 20, bytes >> 20));
        Ok(images)
    }
}

fn disk_image(spec: &DiskSpec) -> Result<DiskImage> {
    Ok(match &spec.file {
        Some(file) => {
            let size = file.metadata().with_context(|| format!("cannot open {}", file.display()))?.len();
            DiskImage { size, pattern: Content::Copy(file.clone()) }
        }
        None => match spec.pattern {
            Pattern::Random => DiskImage::seeded(spec.size_mib.unwrap_or_default() << 20, spec.seed),
            Pattern::Zero => DiskImage::zero(spec.size_mib.unwrap_or_default() << 20),
        },
    })
}
