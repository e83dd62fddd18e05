//! Documents joined into one stream of tokens, cut into windows of one length.
//!
//! Owns packing and its counts. It must not know texts, tokenizers or batches.

/// Joins documents and cuts windows; stops at the number of tokens that fill the windows wanted.
#[derive(Debug)]
pub struct Packer {
    length: usize,
    /// Tokens that the windows hold, if there is a limit.
    wanted: usize,
    separator: Option<u32>,
    tokens: Vec<u32>,
    separators: u64,
    offered: u64,
    in_document: bool,
    document_tokens: usize,
}

impl Packer {
    /// `samples` windows (all that come, if `None`) of `length` tokens, `separator` between documents.
    pub fn new(length: usize, samples: Option<usize>, separator: Option<u32>) -> Self {
        Self {
            length,
            wanted: samples.map_or(usize::MAX, |n| n.saturating_mul(length)),
            separator,
            tokens: Vec::new(),
            separators: 0,
            offered: 0,
            in_document: false,
            document_tokens: 0,
        }
    }

    /// Whether all windows are full.
    pub fn is_full(&self) -> bool {
        self.tokens.len() >= self.wanted
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of tokens packed so far, separators included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was packed yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The next tokens belong to another document.
    pub fn begin_document(&mut self) {
        self.in_document = false;
        self.document_tokens = 0;
    }

    /// Tokens of the document in work that found room.
    pub fn document_tokens(&self) -> usize {
        self.document_tokens
    }

    /// Appends tokens of the document in work; false once all windows are full.
    pub fn push(&mut self, ids: &[u32]) -> bool {
        self.offered += ids.len() as u64;
        if ids.is_empty() {
            return !self.is_full();
        }
        if !self.in_document
            && !self.tokens.is_empty()
            && !self.is_full()
            && let Some(separator) = self.separator
        {
            self.tokens.push(separator);
            self.separators += 1;
        }
        self.in_document = true;
        let room = self.wanted - self.tokens.len().min(self.wanted);
        let fits = ids.len().min(room);
        self.tokens.extend_from_slice(&ids[..fits]);
        self.document_tokens += fits;
        !self.is_full()
    }

    /// The full windows, one after the other.
    pub fn finish(mut self) -> Packed {
        let used = self.tokens.len() - self.tokens.len() % self.length;
        let left_out = self.offered + self.separators - used as u64;
        self.tokens.truncate(used);
        self.tokens.shrink_to_fit();
        Packed {
            windows: used / self.length,
            tokens: self.tokens,
            left_out,
        }
    }
}

/// What packing gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Number of windows.
    pub windows: usize,
    /// Their tokens, row-major.
    pub tokens: Vec<u32>,
    /// Tokens that fill no window: the tail, and what was left of the last document.
    pub left_out: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EOS: u32 = 0;

    fn pack(documents: &[Vec<u32>], length: usize, samples: Option<usize>) -> Packed {
        let mut packer = Packer::new(length, samples, Some(EOS));
        for document in documents {
            packer.begin_document();
            if !packer.push(document) {
                break;
            }
        }
        packer.finish()
    }

    #[test]
    fn windows_are_cut_from_the_joined_stream() {
        let check = |documents: &[&[u32]], length, samples, tokens: &[u32], left_out| {
            let documents: Vec<_> = documents.iter().map(|d| d.to_vec()).collect();
            let packed = pack(&documents, length, samples);
            assert_eq!((&packed.tokens[..], packed.left_out), (tokens, left_out));
            assert_eq!(packed.windows * length, tokens.len());
        };
        check(&[&[1, 2, 3], &[4]], 2, Some(2), &[1, 2, 3, 0], 1);
        check(&[&[1, 2, 3], &[4]], 5, Some(1), &[1, 2, 3, 0, 4], 0);
        check(&[&[1, 2, 3], &[], &[4]], 2, None, &[1, 2, 3, 0], 1);
        check(&[&[1, 2, 3, 4, 5]], 2, Some(1), &[1, 2], 3);
        check(&[&[1]], 2, Some(1), &[], 1);
        check(&[], 2, None, &[], 0);
    }

    proptest! {
        #[test]
        fn tokens_are_conserved(
            documents in prop::collection::vec(prop::collection::vec(1u32..9, 0..20), 0..20),
            length in 1usize..9,
            samples in prop::option::of(0usize..20),
        ) {
            let packed = pack(&documents, length, samples);
            let full: Vec<_> = documents.iter().filter(|d| !d.is_empty()).cloned().collect();
            let joined = full.join(&EOS);
            prop_assert_eq!(&packed.tokens[..], &joined[..packed.tokens.len()]);
            prop_assert_eq!(packed.tokens.len(), packed.windows * length);
            let possible = joined.len() / length;
            prop_assert_eq!(packed.windows, samples.map_or(possible, |n| n.min(possible)));
            if samples.is_none() {
                prop_assert_eq!(packed.tokens.len() as u64 + packed.left_out, joined.len() as u64);
            }
        }
    }
}
