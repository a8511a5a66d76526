use super::*;
use crate::format::{checksum, npy};

#[test]
fn nothing_is_made_while_looking() {
    let temp = tempfile::tempdir().unwrap();
    let absent = temp.path().join("absent");
    assert!(matches!(
        list_folder(&absent),
        Err(Error::Source(SourceError::NotFound { .. }))
    ));
    assert!(matches!(
        Checkpoint::open(&absent),
        Err(Error::Source(SourceError::NotFound { .. }))
    ));
    assert!(matches!(
        Checkpoint::open(temp.path()),
        Err(Error::Source(SourceError::NotFound { .. }))
    ));
    assert_eq!(discard_folder(&absent).unwrap(), None);
    assert!(list_folder(temp.path()).unwrap().is_empty());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
}

/// One float32 tensor of four elements, landed by hand.
fn landed(dir: &Path) -> Vec<u8> {
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let mut file = npy::encode_header("<f4", false, &[2, 2]);
    let data_offset = file.len();
    file.extend_from_slice(&data);
    std::fs::write(dir.join("w.npy"), &file).unwrap();
    let manifest = serde_json::json!({
        "format": "tensorferry", "version": 1, "created": "1970-01-01T00:00:00Z", "checkpoint": "c",
        "source": {"format": "npy", "metadata": {}}, "transfer_id": "", "fingerprint": null,
        "entries_digest": "", "chunk_len": 1 << 20, "durability": "disk",
        "tensors": [{
            "index": 0, "name": "w", "source_name": "w", "aliases": ["v"], "file": "w.npy",
            "dtype": "float32", "npy_descr": "<f4", "shape": [2, 2], "fortran_order": false,
            "byteorder": "little", "packed": false, "data_offset": data_offset, "nbytes": 16,
            "crc32c": format!("{:08x}", checksum::crc32c(&data)),
        }],
        "files": [], "total_nbytes": 16,
    });
    std::fs::write(dir.join(MANIFEST_FILE), manifest.to_string()).unwrap();
    file
}

#[test]
fn tensors_are_mapped_under_all_their_names() {
    let temp = tempfile::tempdir().unwrap();
    landed(temp.path());
    let checkpoint = Checkpoint::open(temp.path()).unwrap();
    let view = checkpoint.tensor("w").unwrap().unwrap();
    assert_eq!(view.as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    assert!(view.as_slice::<f64>().is_err() && view.as_slice::<u8>().is_err());
    assert!(checkpoint.tensor("v").unwrap().is_some());
    assert!(checkpoint.tensor("x").unwrap().is_none());
}

#[test]
fn every_kind_of_damage_is_found_with_both_values() {
    let temp = tempfile::tempdir().unwrap();
    let whole = landed(temp.path());
    let path = temp.path().join("w.npy");
    let checkpoint = Checkpoint::open(temp.path()).unwrap();
    let damages = || checkpoint.verify(|_| {}).unwrap().damages;
    assert!(damages().is_empty());
    let (mut data, mut header) = (whole.clone(), whole.clone());
    data[whole.len() - 1] ^= 1;
    header[20] ^= 1;
    for (bytes, word) in [
        (&data[..], "crc32c"),
        (&header, "header"),
        (&whole[..whole.len() - 1], "bytes were expected"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        assert!(damages()[0].why.contains(word), "{:?}", damages());
    }
    std::fs::remove_file(&path).unwrap();
    assert!(damages()[0].why.contains("missing"));
}
