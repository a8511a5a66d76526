//! One `.npy` file: one tensor.

use super::{SourceError, builder::Builder, files::OpenFile, view::Refusal};
use crate::format::npy::{NpyError, NpyHeader, dtype_of_descr, header_len, parse_header};
use crate::plan::{EntryHeader, EntryKind, Order, PlanError, clip};
use std::path::Path;

/// Adds the tensor of a file, named like the file without `.npy`.
pub(super) fn load(path: &Path, file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    let file_name = path.file_name().unwrap_or(path.as_os_str());
    let Some(file_name) = file_name.to_str() else {
        let why = "the name of the file is not utf-8";
        return Err(SourceError::unsupported(
            path,
            &file_name.to_string_lossy(),
            why,
        ));
    };
    let name = file_name
        .strip_suffix(".npy")
        .filter(|n| !n.is_empty())
        .unwrap_or(file_name);

    let (header, bytes) = read_header(file)?;
    let npy_len = file.byte_len();
    let (entry, data_offset) =
        entry_of(name, header, npy_len).map_err(|refusal| refusal.of(file.path()))?;
    let index = builder.files.add(file, &bytes)?;
    builder.add(entry, index, data_offset)?;
    builder.add_format("npy");
    Ok(())
}

/// The tensor that a header announces, and where its data begin in `npy_len` bytes.
pub(super) fn entry_of(
    name: &str,
    header: NpyHeader,
    npy_len: u64,
) -> Result<(EntryHeader, u64), Refusal> {
    let (dtype, big_endian) =
        dtype_of_descr(&header.descr).map_err(|error| refusal(name, error))?;
    let byte_len = dtype
        .byte_len(&header.shape)
        .ok_or_else(|| PlanError::Shape {
            name: clip(name),
            why: format!(
                "shape {:?} of {dtype} does not fit in 64 bits",
                header.shape
            ),
        })?;
    // What follows the data is ignored, as numpy does.
    let data_offset = header.data_offset;
    if data_offset
        .checked_add(byte_len)
        .is_none_or(|end| end > npy_len)
    {
        let why =
            format!("its header announces {data_offset} + {byte_len} bytes, there are {npy_len}");
        return Err(Refusal::Malformed { at: 0, why });
    }
    let entry = EntryHeader {
        name: name.to_owned(),
        kind: EntryKind::Tensor { dtype },
        shape: header.shape,
        order: if header.fortran_order {
            Order::Fortran
        } else {
            Order::C
        },
        big_endian,
        byte_len,
    };
    Ok((entry, data_offset))
}

/// The header of a file, parsed and raw.
pub(super) fn read_header(file: &OpenFile) -> Result<(NpyHeader, Vec<u8>), SourceError> {
    let error = |error| refusal("", error).of(file.path());
    let len = header_len(&file.prefix(12)?).map_err(error)?;
    let bytes = file.prefix(len as u64)?;
    let header = parse_header(&bytes).map_err(error)?;
    Ok((header, bytes))
}

/// What is wrong with a header, of which nothing but a part of a file is known.
pub(super) fn refusal(name: &str, error: NpyError) -> Refusal {
    let why = error.to_string();
    match error {
        NpyError::Object { .. }
        | NpyError::Structured
        | NpyError::Descr { .. }
        | NpyError::Version { .. } => Refusal::unsupported(name, why),
        _ => Refusal::Malformed { at: 0, why },
    }
}

#[cfg(test)]
mod tests {
    use crate::format::{Dtype, npy::encode_header};
    use crate::plan::{Order, PlanError};
    use crate::source::{SourceError, SourceOptions, SourceSet};
    use std::path::PathBuf;

    fn open(header: &[u8], data: &[u8]) -> (tempfile::TempDir, Result<SourceSet, SourceError>) {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("layer.0.weight.npy");
        std::fs::write(&path, [header, data].concat()).unwrap();
        let set = SourceSet::open(&[path], &SourceOptions::default());
        (folder, set)
    }

    #[test]
    fn fortran_order_and_big_endian_are_kept() {
        let (_folder, set) = open(&encode_header(">f4", true, &[2, 3]), &[7; 24]);
        let set = set.unwrap();
        let header = &set.entries()[0].header;
        assert_eq!(
            (set.format(), header.name.as_str()),
            ("npy", "layer.0.weight")
        );
        assert_eq!((header.order, header.big_endian), (Order::Fortran, true));
        assert_eq!(
            (header.dtype(), &header.shape[..]),
            (Some(Dtype::F32), &[2, 3][..])
        );
        let mut bytes = [0; 24];
        set.read_at(0, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 24]);
    }

    #[test]
    fn scalars_and_empty_arrays() {
        let (_folder, set) = open(&encode_header("<f8", false, &[]), &[1; 8]);
        assert_eq!(set.unwrap().total_bytes(), 8);
        let (_folder, set) = open(&encode_header("<f8", false, &[0, 5]), &[]);
        let set = set.unwrap();
        assert_eq!((set.total_bytes(), set.entries()[0].sources.len()), (0, 1));
        set.read_at(0, 0, &mut []).unwrap();
        assert!(matches!(
            set.read_at(0, 0, &mut [0]),
            Err(SourceError::Range { .. })
        ));
    }

    #[test]
    fn short_files_are_damaged_and_long_ones_are_not() {
        let header = encode_header("<f4", false, &[2]);
        let (_folder, set) = open(&header, &[1; 9]);
        assert_eq!(set.unwrap().total_bytes(), 8);
        let (_folder, set) = open(&header, &[1; 7]);
        let error = set.unwrap_err();
        assert!(matches!(error, SourceError::Malformed { .. }));
        let text = error.to_string();
        assert!(text.contains("128 + 8") && text.contains("135"), "{text}");
        let (_folder, set) = open(&header[..100], &[]);
        assert!(matches!(set, Err(SourceError::Malformed { .. })));
        let (_folder, set) = open(&encode_header("<f4", false, &[1 << 40, 1 << 40]), &[]);
        assert!(matches!(
            set,
            Err(SourceError::Plan(PlanError::Shape { .. }))
        ));
    }

    #[test]
    fn pickles_are_not_opened() {
        for descr in ["|O", "<U8", "<M8[ns]"] {
            let (_folder, set) = open(&encode_header(descr, false, &[1]), &[0; 64]);
            assert!(
                matches!(set, Err(SourceError::Unsupported { .. })),
                "{descr}"
            );
        }
    }
}
