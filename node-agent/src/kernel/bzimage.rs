//! Takes the ELF kernel out of a compressed x86 boot image: emulated guests start half a second
//! sooner without unpacking it themselves.
//!
//! Only LZ4 (legacy frames) is known, which is what Debian's cloud kernel uses.

const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Every block of a legacy frame but the last unpacks to this.
const BLOCK_MAX: usize = 8 << 20;
/// An ELF kernel larger than this is not one of ours.
const VMLINUX_MAX: usize = 512 << 20;

/// The ELF image inside a bzImage.
pub(super) fn vmlinux(image: &[u8]) -> Result<Vec<u8>, String> {
    let payload = payload(image).ok_or("its vmlinuz has no Linux boot header")?;
    let Some(mut blocks) = payload.strip_prefix(&LZ4_LEGACY) else {
        let start = payload.get(..4).unwrap_or_default();
        return Err(format!(
            "its vmlinuz is not compressed with LZ4 (it starts with {start:02x?})"
        ));
    };
    let mut out = Vec::new();
    let mut block = vec![0; BLOCK_MAX];
    while let Some((len, rest)) = split_u32(blocks) {
        // The payload ends with the unpacked size, which is no block.
        if rest.is_empty() {
            break;
        }
        let data = rest.get(..len as usize).ok_or("its vmlinuz ends in the middle of a block")?;
        blocks = &rest[len as usize..];
        let unpacked = lz4_flex::block::decompress_into(data, &mut block)
            .map_err(|error| format!("its vmlinuz does not unpack: {error}"))?;
        out.extend_from_slice(&block[..unpacked]);
        if out.len() > VMLINUX_MAX {
            return Err(format!("its kernel is larger than {VMLINUX_MAX} bytes"));
        }
    }
    if !out.starts_with(b"\x7fELF") {
        return Err("its vmlinuz holds no ELF kernel".into());
    }
    Ok(out)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let (offset, _) = split_u32(image.get(0x248..)?)?;
    let (len, _) = split_u32(image.get(0x24c..)?)?;
    let start = (setup_sectors + 1) * 512 + offset as usize;
    image.get(start..)?.get(..len as usize)
}

fn split_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*number), rest))
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers made here")]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn packed(elf: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in elf.chunks(BLOCK_MAX) {
            let block = lz4_flex::block::compress(block);
            payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
            payload.extend_from_slice(&block);
        }
        payload.extend_from_slice(&(elf.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn an_elf_of_several_blocks_comes_out_whole() {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..BLOCK_MAX + 1000).map(|at| (at % 255) as u8));
        assert!(vmlinux(&image(&packed(&elf))).unwrap() == elf);
    }

    #[test]
    fn what_is_not_a_kernel_is_an_error_not_a_panic() {
        let good = image(&packed(b"\x7fELF and more"));
        for len in 0..good.len() {
            assert!(vmlinux(&good[..len]).is_err(), "cut to {len} bytes");
        }
        let error = vmlinux(&image(b"\xfd7zXZ....")).unwrap_err();
        assert!(error.contains("not compressed with LZ4"), "{error}");
    }
}
