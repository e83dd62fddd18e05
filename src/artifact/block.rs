//! Writes the sums of a block site by site as they come, so that those of a mixture's many experts are never together in memory. The
//! file's header is known before: names and shapes follow from the sites' widths.

use super::{HEADER, file_name, panel_name, tensor_name};
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::formats::TensorSpec;
use crate::model::SiteKind;
use crate::statistics::{Exponents, Product, SiteStatistics};
use crate::storage::GrowingFile;
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// A block file on its way.
#[derive(Debug)]
pub struct BlockWriter {
    file: GrowingFile,
    hash: Sha256,
    folder: PathBuf,
    block: usize,
    left: std::vec::IntoIter<(SiteKind, usize)>,
    /// They stand at the end: widest dtype first keeps every tensor aligned.
    exponents: Vec<Exponents>,
}

impl BlockWriter {
    /// Begins the file of `block` for the artifact in `folder`, with these products of sites with these widths. Until it is finished
    /// it lies in the folder `work`.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(
        folder: &Path,
        work: &Path,
        block: usize,
        sites: Vec<(SiteKind, usize)>,
        products: &[Product],
    ) -> Result<Self> {
        let spec = |name, dtype, shape| TensorSpec { name, dtype, shape };
        let mut specs = Vec::new();
        for &(site, width) in &sites {
            for &product in products {
                specs.extend(product.panels(width).into_iter().map(|(rows, columns)| {
                    let shape = vec![rows.len(), columns.len()];
                    spec(panel_name(site, product, rows.start), Dtype::I64, shape)
                }));
            }
            specs.push(spec(tensor_name(site, "tokens"), Dtype::U64, vec![1]));
        }
        for &(site, width) in &sites {
            specs.push(spec(tensor_name(site, "exponents"), Dtype::I32, vec![width]));
        }
        let header = checkpoint::header(HEADER, &specs.iter().collect::<Vec<_>>())?;
        let mut writer = Self {
            file: GrowingFile::create(&work.join(format!("block-{block:05}")))?,
            hash: Sha256::new(),
            folder: folder.to_owned(),
            block,
            left: sites.into_iter(),
            exponents: Vec::new(),
        };
        writer.write(&header)?;
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write(bytes)
    }

    /// Writes the sums of the next site.
    ///
    /// # Errors
    /// More was taken away than there is, the sums are of another site, or the disk is full.
    pub fn add(&mut self, site: SiteKind, statistics: &SiteStatistics) -> Result<()> {
        let subject = self.folder.display().to_string();
        let tokens = u64::try_from(statistics.tokens()).map_err(|_| {
            Error::invalid(
                subject,
                "fewer tokens than none would be left",
                "these batches are not in the artifact",
            )
        })?;
        if self.left.next() != Some((site, statistics.width())) {
            return Err(self.misplaced(&format!("{site:?}")));
        }
        for panel in statistics.panels() {
            self.write(bytemuck::cast_slice(&panel.sums.read()))?;
        }
        self.write(&tokens.to_le_bytes())?;
        self.exponents.push(statistics.exponents().clone());
        Ok(())
    }

    /// Gives the file its name, which follows from the content, and returns that.
    ///
    /// # Errors
    /// A site is missing, or the disk is full.
    pub fn finish(mut self) -> Result<String> {
        if let Some((site, _)) = self.left.next() {
            return Err(self.misplaced(&format!("{site:?}")));
        }
        for exponents in std::mem::take(&mut self.exponents) {
            self.write(bytemuck::cast_slice(exponents.values()))?;
        }
        let name = file_name(self.block, &self.hash.finalize());
        self.file.finish(&self.folder.join(&name))?;
        Ok(name)
    }

    fn misplaced(&self, site: &str) -> Error {
        Error::Worker(format!(
            "the sums of block {}, {site}, are out of place",
            self.block
        ))
    }
}
