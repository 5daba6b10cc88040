//! Initialisers laid out as bytes (PTX ISA, "Initializers").

use crate::ast::{Image, Init, Relocation, Variable};

impl Variable {
    /// The contents of an initialised variable: [`Variable::bytes`] bytes, elements that are not
    /// listed zero, and the addresses to fill in. `None` where there is no initialiser.
    pub fn image(&self) -> Option<Image> {
        let init = self.init.as_ref()?;
        let mut image = Image { bytes: vec![0; self.bytes() as usize], relocations: Vec::new() };
        // Elements below one entry of each dimension; a vector is one more dimension.
        let mut sizes: Vec<u64> = self.dims.iter().map(|d| d.unwrap_or(0)).collect();
        if self.vector > 1 {
            sizes.push(u64::from(self.vector));
        }
        let mut strides = vec![u64::from(self.ty.bytes()); sizes.len()];
        for i in (0..sizes.len().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1].saturating_mul(sizes[i + 1]);
        }
        self.place(init, 0, &strides, &mut image);
        Some(image)
    }

    fn place(&self, init: &Init, offset: u64, strides: &[u64], image: &mut Image) {
        let size = self.ty.bytes();
        match init {
            Init::List(list) => {
                let natural = u64::from(size);
                let (stride, inner) =
                    strides.split_first().map_or((natural, strides), |(s, i)| (*s, i));
                // A flat list fills an array of arrays element by element.
                let flat = !list.iter().any(|i| matches!(i, Init::List(_)));
                let stride = if flat { natural } else { stride };
                for (i, item) in list.iter().enumerate() {
                    self.place(item, offset + i as u64 * stride, inner, image);
                }
            }
            Init::Imm(imm) => {
                let bytes = imm.bits(self.ty).to_le_bytes();
                let at = offset as usize;
                if let Some(room) = image.bytes.get_mut(at..at + size.min(8) as usize) {
                    room.copy_from_slice(&bytes[..room.len()]);
                }
            }
            Init::Symbol { symbol, addend, generic, mask } => {
                let shift = mask.map_or(0, |m| m.trailing_zeros().min(63));
                let whole = offset.checked_add(u64::from(size));
                if whole.is_some_and(|end| end <= image.bytes.len() as u64) {
                    let (symbol, addend, generic) = (*symbol, *addend, *generic);
                    image.relocations.push(Relocation {
                        offset,
                        size,
                        symbol,
                        addend,
                        generic,
                        shift,
                    });
                }
            }
        }
    }
}
